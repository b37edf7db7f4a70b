"""Metrics: what requests took and the engine's counters go in; Prometheus' text and the status page's figures come out.

Names are those that vLLM's users have on their dashboards, where they mean the same.
"""

import time
from collections import deque
from collections.abc import Iterable, Sequence

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from autodeploy.outputs import OutputCollector, OutputDelta
from autodeploy.server.served import ServedModel

RECENT = 1000
"""Requests whose latencies the status page's percentiles are of."""

METHODS = frozenset({"GET", "POST", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE"})
_SECONDS = tuple(0.001 * 2**power for power in range(18))  # to 131 seconds
_TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 16384, 65536)
_SEQUENCES = (1, 2, 5, 10, 20, 50, 128)


class ServingMetrics:
    """All metrics of one server."""

    def __init__(self, served: ServedModel):
        self._served = served
        self._registry = CollectorRegistry()
        self._registry.register(_EngineMetrics(served))
        ProcessCollector(registry=self._registry)
        self.started = time.monotonic()
        self.recent_first_token: deque[float] = deque(maxlen=RECENT)
        self.recent_between_tokens: deque[float] = deque(maxlen=RECENT)
        self.recent_total: deque[float] = deque(maxlen=RECENT)
        self._queue = self._histogram("request_queue_time_seconds", "From arrival to the first step.", _SECONDS)
        self._first_token = self._histogram("time_to_first_token_seconds", "Until a request's first token.", _SECONDS)
        self._between = self._histogram("inter_token_latency_seconds", "Between two tokens of a sequence.", _SECONDS)
        self._total = self._histogram("e2e_request_latency_seconds", "From arrival to the last token.", _SECONDS)
        self._inference = self._histogram(
            "request_inference_time_seconds", "From the first step to the last token.", _SECONDS
        )
        self._prefill = self._histogram(
            "request_prefill_time_seconds", "From the first step to the first token.", _SECONDS
        )
        self._decode = self._histogram("request_decode_time_seconds", "From the first token to the last.", _SECONDS)
        self._per_token = self._histogram(
            "request_time_per_output_token_seconds", "The latter by the tokens after the first.", _SECONDS
        )
        self._prompt = self._histogram("request_prompt_tokens", "Tokens of a request's prompt.", _TOKENS)
        self._computed = self._histogram(
            "request_prefill_kv_computed_tokens", "Of those, tokens that were not in the cache.", _TOKENS
        )
        self._generation = self._histogram("request_generation_tokens", "Tokens generated for a request.", _TOKENS)
        self._longest = self._histogram(
            "request_max_num_generation_tokens", "Tokens of a request's longest sequence.", _TOKENS
        )
        self._max_tokens = self._histogram("request_params_max_tokens", "max_tokens of a request.", _TOKENS)
        self._n = self._histogram("request_params_n", "n of a request.", _SEQUENCES)
        self._ended = self._counter("vllm:request_success", "Sequences that ended, by reason.", "finished_reason")
        self._rejected = self._counter("vllm:admission_rejections", "Requests refused for a full queue.", "reason")
        self._answers = Counter(
            "http_requests", "HTTP requests.", ["handler", "method", "status"], registry=self._registry
        )

    def text(self) -> bytes:
        """For a scrape."""
        return generate_latest(self._registry)

    def watch(self, collectors: Sequence[OutputCollector]) -> "RequestWatch":
        """Follows the requests of one call."""
        return RequestWatch(self, collectors)

    def note_first_token(self, seconds: float) -> None:
        self._first_token.observe(seconds)
        self.recent_first_token.append(seconds)

    def note_token(self, seconds: float) -> None:
        self._between.observe(seconds)
        self.recent_between_tokens.append(seconds)

    def note_end(self, reason: str) -> None:
        self._ended.labels(self._served.names[0], reason).inc()

    def note_rejection(self) -> None:
        self._rejected.labels(self._served.names[0], "max_queued_requests").inc()

    def note_answer(self, method: str, route: str, status: int) -> None:
        """An HTTP request is over. route: as the app has it, so that nobody can make up labels."""
        self._answers.labels(route, method if method in METHODS else "other", f"{status // 100}xx").inc()

    def note_request(self, collector: OutputCollector) -> None:
        """A request all of whose sequences have ended."""
        times = collector.metrics
        scheduled, first, finished = times.first_scheduled_time, times.first_token_time, times.finished_time
        longest = max(collector.num_tokens_of_each)
        if finished is not None:
            self._total.observe(finished - times.arrival_time)
            self.recent_total.append(finished - times.arrival_time)
        if scheduled is not None:
            self._queue.observe(scheduled - times.arrival_time)
        if scheduled is not None and first is not None and finished is not None:
            self._inference.observe(finished - scheduled)
            self._prefill.observe(first - scheduled)
            self._decode.observe(finished - first)
            if longest > 1:
                self._per_token.observe((finished - first) / (longest - 1))
        self._prompt.observe(len(collector.prompt_token_ids))
        self._computed.observe(len(collector.prompt_token_ids) - (collector.num_cached_tokens or 0))
        self._generation.observe(collector.num_output_tokens)
        self._longest.observe(longest)
        self._n.observe(collector.params.n)
        if collector.params.max_tokens is not None:
            self._max_tokens.observe(collector.params.max_tokens)

    def _counter(self, name: str, help_text: str, label: str) -> Counter:
        return Counter(name, help_text, ["model_name", label], registry=self._registry)

    def _histogram(self, name: str, help_text: str, buckets: Sequence[float]) -> Histogram:
        histogram = Histogram(
            f"vllm:{name}", help_text, ["model_name"], registry=self._registry, buckets=tuple(buckets)
        )
        return histogram.labels(self._served.names[0])


class RequestWatch:
    """Takes the times of one call's requests as their outputs pass by."""

    def __init__(self, metrics: ServingMetrics, collectors: Sequence[OutputCollector]):
        self._metrics = metrics
        self._collectors = {collector.request_id: collector for collector in collectors}
        self._latest: dict[tuple[str, int], float] = {}

    def see(self, request_id: str, delta: OutputDelta) -> None:
        now = time.monotonic()
        collector = self._collectors[request_id]
        if delta.token_ids:
            before = self._latest.get((request_id, delta.index))
            if before is None:
                self._metrics.note_first_token(now - collector.metrics.arrival_time)
            else:
                self._metrics.note_token((now - before) / len(delta.token_ids))
            self._latest[request_id, delta.index] = now
        if delta.finish_reason is not None:
            self._metrics.note_end(delta.finish_reason)
            if collector.finished:
                self._metrics.note_request(collector)

    def close(self) -> None:
        """Nothing more will be seen: what has not ended never will, as its client has gone."""
        for collector in self._collectors.values():
            outputs = [] if collector.finished else collector.snapshot().outputs
            for output in outputs:
                if output.finish_reason is None:
                    self._metrics.note_end("abort")
        self._collectors.clear()


class _EngineMetrics:
    """Reads the engine's counters whenever they are asked for."""

    def __init__(self, served: ServedModel):
        self._served = served

    def collect(self) -> Iterable[Metric]:
        stats = self._served.engine.stats()
        gauges = (
            ("num_requests_running", "Sequences in the running batch.", stats.num_running),
            ("num_requests_waiting", "Sequences waiting to run.", stats.num_waiting),
            ("kv_cache_usage_perc", "Share of the state memory in use; 1 means all.", stats.state_usage_fraction),
        )
        counters = (
            ("num_preemptions", "Sequences put back to waiting for lack of memory.", stats.num_preemptions),
            ("prompt_tokens", "Prompt tokens processed.", stats.prompt_tokens),
            ("generation_tokens", "Tokens generated.", stats.generation_tokens),
            ("prefix_cache_queries", "Prompt tokens looked for in the cache.", stats.prefix_cache_queried_tokens),
            ("prefix_cache_hits", "Prompt tokens found in the cache.", stats.prefix_cache_hit_tokens),
            ("prompt_tokens_cached", "Prompt tokens found in the cache.", stats.prefix_cache_hit_tokens),
            ("spec_decode_num_drafts", "Verifications of drafts.", stats.num_drafts),
            ("spec_decode_num_draft_tokens", "Tokens drafted.", stats.draft_tokens),
            ("spec_decode_num_accepted_tokens", "Drafted tokens that became output.", stats.accepted_tokens),
        )
        for kind, entries in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, help_text, value in entries:
                metric = kind(f"vllm:{name}", help_text, labels=["model_name"])
                metric.add_metric([self._served.names[0]], float(value))
                yield metric
