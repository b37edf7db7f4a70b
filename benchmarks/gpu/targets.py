"""Targets: the entries of a record go in; out come the figures asked for of one large GPU, beside what is asked."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

Entries = Sequence[dict[str, Any]]
_DENSE, _HYBRID, _SMALL, _MIXTURE = "llama-3.1-8b", "nemotron-3-nano-30b-a3b", "qwen2.5-3b", "nemotron-flash-3b"


@dataclass(frozen=True)
class Target:
    """A figure, how to read it from a record (None where it is not there), and the least and the aim of it."""

    name: str
    unit: str
    value: Callable[[Entries], float | None]
    least: float | None
    aim: float | None
    smaller_is_better: bool = False

    def verdict(self, entries: Entries) -> str:
        """The figure beside its targets, in one line."""
        value = self.value(entries)
        if value is None:
            return f"{self.name}: not measured"
        bounds = [
            f"{what} {bound:g}" for what, bound in (("least", self.least), ("aim", self.aim)) if bound is not None
        ]
        judged = f" ({', '.join(bounds)}): {self._reached(value)}" if bounds else ""
        return f"{self.name}: {value:.4g} {self.unit}".rstrip() + judged

    def _reached(self, value: float) -> str:
        def passes(bound: float | None) -> bool:
            return bound is not None and (value <= bound if self.smaller_is_better else value >= bound)

        return "aim reached" if passes(self.aim) else "least reached" if passes(self.least) else "missed"


def find(entries: Entries, model: str, figure: str, precision: str = "bf16") -> dict[str, Any] | None:
    """The latest entry of a figure without an error."""
    of_it = [e for e in entries if (e["model"], e["figure"], e["precision"]) == (model, figure, precision)]
    return next((entry for entry in reversed(of_it) if "error" not in entry), None)


def _of(model: str, figure: str, key: str, precision: str = "bf16") -> Callable[[Entries], float | None]:
    def value(entries: Entries) -> float | None:
        entry = find(entries, model, figure, precision)
        return None if entry is None else float(entry[key])

    return value


def _ratio(one: Callable[[Entries], float | None], other: Callable[[Entries], float | None]) -> Any:
    def value(entries: Entries) -> float | None:
        above, below = one(entries), other(entries)
        return None if above is None or below is None else above / below

    return value


def _idle(model: str, batch: int) -> Callable[[Entries], float | None]:
    def value(entries: Entries) -> float | None:
        entry = find(entries, model, "profile")
        steps = (entry or {}).get(f"batch_{batch}", {}).get("decode", {})
        if not steps.get("on_device"):
            return None
        return float(100 * steps["timeline"]["between_seconds"] / steps["timeline"]["seconds"])

    return value


_RATE, _MANY = "tokens_per_second", "output_tokens_per_second"
TARGETS = (
    Target("single stream, 8B bf16, 1k/1k", "tokens/s", _of(_DENSE, "single", _RATE), 240, None),
    Target("the same, share of the copy rate", "", _of(_DENSE, "single", "memory_share"), None, 0.9),
    Target(
        "the same, over transformers compiled", "times",
        _ratio(_of(_DENSE, "single", _RATE), _of(_DENSE, "transformers", _RATE)), 1, None,
    ),
    *(
        Target(
            f"single stream, {model}, over transformers compiled", "times",
            _ratio(_of(model, "single", _RATE), _of(model, "transformers", _RATE)), 1, None,
        )
        for model in (_SMALL, _HYBRID, "qwen3-30b-a3b", "gpt-oss-20b")
    ),
    Target("single stream, 30B-A3B hybrid", "tokens/s", _of(_HYBRID, "single", _RATE), None, 350),
    Target(
        "the same, over a dense 3B in transformers", "times",
        _ratio(_of(_HYBRID, "single", _RATE), _of(_SMALL, "transformers", _RATE)), 1.5, None,
    ),
    Target("throughput, 8B FP8, 1k/1k", "tokens/s", _of(_DENSE, "throughput", _MANY, "fp8"), 9000, 17744),
    Target("throughput, 8B bf16, 1k/1k", "tokens/s", _of(_DENSE, "throughput", _MANY), None, None),
    Target("throughput, hybrid with experts, 1k/1k", "tokens/s", _of(_HYBRID, "throughput", _MANY), 6000, 13000),
    Target(
        "3B mixture over a dense 3B, 8k/16k", "times",
        _ratio(_of(_MIXTURE, "long", _MANY), _of(_SMALL, "long", _MANY)), 1, None,
    ),
    Target("capture to first token, 8B, cold", "s", _of(_DENSE, "start_cold", "seconds"), 60, None, True),
    Target("capture to first token, 8B, warm", "s", _of(_DENSE, "start_warm", "seconds"), None, 15, True),
    Target("idle between steps, 8B, batch 1", "%", _idle(_DENSE, 1), 5, None, True),
    Target("idle between steps, 8B, batch 64", "%", _idle(_DENSE, 64), 5, None, True),
)  # fmt: skip
