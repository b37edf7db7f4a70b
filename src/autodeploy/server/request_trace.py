"""What is noted about a request while it runs, for its span; nothing of it needs OpenTelemetry (see `tracing.py`)."""

from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field

from autodeploy.outputs import OutputCollector
from autodeploy.runtime.request import SamplingParams

Attribute = str | bool | int | float | Sequence[str]

CURRENT: ContextVar["RequestTrace | None"] = ContextVar("request_trace", default=None)
"""The trace of the request that is being served; None where requests are not traced."""


@dataclass
class RequestTrace:
    """What a request's span will say.

    Attributes:
        operation: `chat` or `text_completion`; "" for a request that was refused before it came to that.
        requested: attributes of what was asked for.
        collectors: one per prompt; read when the request is over.
        failure: why the answer broke off after it had begun.
    """

    operation: str = ""
    model: str = ""
    requested: dict[str, Attribute] = field(default_factory=dict)
    collectors: Sequence[OutputCollector] = ()
    failure: str | None = None

    def attributes(self) -> dict[str, Attribute]:
        """Everything known by now, under the names of the GenAI conventions and of vLLM's traces; times in seconds."""
        if not self.operation:
            return {}
        found: dict[str, Attribute] = {"gen_ai.operation.name": self.operation, "gen_ai.response.model": self.model}
        return found | self.requested | (_outcome(self.collectors) if self.collectors else {})


def note_request(operation: str, model: str, answer_id: str, params: SamplingParams, is_stream: bool) -> None:
    """A request was understood: what it asks for. Nothing happens where requests are not traced."""
    trace = CURRENT.get()
    if trace is None:
        return
    trace.operation, trace.model = operation, model
    asked: dict[str, Attribute | None] = {
        "gen_ai.response.id": answer_id,
        "gen_ai.request.model": model,
        "gen_ai.request.stream": is_stream,
        "gen_ai.request.max_tokens": params.max_tokens,
        "gen_ai.request.temperature": params.temperature,
        "gen_ai.request.top_p": params.top_p,
        "gen_ai.request.top_k": params.top_k,
        "gen_ai.request.frequency_penalty": params.frequency_penalty,
        "gen_ai.request.presence_penalty": params.presence_penalty,
        "gen_ai.request.choice.count": params.n,
        "gen_ai.request.seed": params.seed,
    }
    trace.requested = {name: value for name, value in asked.items() if value is not None}


def note_collectors(collectors: Sequence[OutputCollector]) -> None:
    """The engine accepted the request; what becomes of it is read from these."""
    trace = CURRENT.get()
    if trace is not None:
        trace.collectors = collectors


def note_failure(message: str) -> None:
    """The answer broke off after it had begun, when its status had been sent already."""
    trace = CURRENT.get()
    if trace is not None:
        trace.failure = message


def _outcome(collectors: Sequence[OutputCollector]) -> dict[str, Attribute]:
    """Tokens, ends and latencies: of several prompts until the first of them got so far, and until the last ended."""
    choices = [output for collector in collectors for output in collector.snapshot().outputs]
    found: dict[str, Attribute] = {
        "gen_ai.usage.input_tokens": sum(len(collector.prompt_token_ids) for collector in collectors),
        "gen_ai.usage.output_tokens": sum(collector.num_output_tokens for collector in collectors),
        "gen_ai.usage.cache_read.input_tokens": sum(collector.num_cached_tokens or 0 for collector in collectors),
        "gen_ai.response.finish_reasons": [choice.finish_reason or "abort" for choice in choices],
    }
    times = [collector.metrics for collector in collectors]
    arrival = times[0].arrival_time
    scheduled = [at.first_scheduled_time for at in times if at.first_scheduled_time is not None]
    first_tokens = [at.first_token_time for at in times if at.first_token_time is not None]
    finished = [at.finished_time for at in times if at.finished_time is not None]
    if scheduled:
        found["gen_ai.latency.time_in_queue"] = min(scheduled) - arrival
    if first_tokens:
        found["gen_ai.latency.time_to_first_token"] = min(first_tokens) - arrival
    if len(finished) == len(collectors):
        found["gen_ai.latency.e2e"] = max(finished) - arrival
    return found
