"""Prometheus metrics: the engine's counters and what requests took go in, a scrape's text comes out.

Names are those that vLLM's users have on their dashboards, where they mean the same.
"""

from collections.abc import Iterable

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from autodeploy.server.served import ServedModel


class EngineMetrics:
    """Reads the engine's counters whenever they are asked for, under the names that dashboards for vLLM use."""

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
        )
        for kind, entries in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, help_text, value in entries:
                metric = kind(f"vllm:{name}", help_text, labels=["model_name"])
                metric.add_metric([self._served.names[0]], float(value))
                yield metric
