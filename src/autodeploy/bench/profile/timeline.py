"""Timeline: spans of work, each with the step it belongs to, go in; how busy they are and where gaps are comes out."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Span:
    """Work from `begin` to `end`, in seconds; `owner` is the number of its step, or None: between steps."""

    begin: float
    end: float
    owner: int | None


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """Consecutive steps, from the first one's first work to the last one's last.

    Attributes:
        steps: how many.
        seconds: altogether.
        busy_seconds: with work going on, sampling and copies included.
        within_seconds: without any, between two pieces of work of one step.
        between_seconds: without any, elsewhere.
    """

    steps: int
    seconds: float
    busy_seconds: float
    within_seconds: float
    between_seconds: float

    @property
    def within_share(self) -> float:
        return self.within_seconds / self.seconds

    @property
    def between_share(self) -> float:
        return self.between_seconds / self.seconds


def timeline(spans: Sequence[Span]) -> Timeline | None:
    """Of spans in any order, which may overlap; None where no span belongs to a step."""
    owned = [span for span in spans if span.owner is not None]
    if not owned:
        return None
    first, last = min(span.begin for span in owned), max(span.end for span in owned)
    inside = sorted((s for s in spans if s.end > first and s.begin < last), key=lambda span: span.begin)
    within = between = 0.0
    reached, before = first, inside[0].owner
    for span in inside:
        if span.begin > reached:
            if span.owner is not None and span.owner == before:
                within += span.begin - reached
            else:
                between += span.begin - reached
        if span.end >= reached:
            reached, before = span.end, span.owner
    return Timeline(
        steps=len({span.owner for span in owned}),
        seconds=last - first,
        busy_seconds=last - first - within - between,
        within_seconds=within,
        between_seconds=between,
    )
