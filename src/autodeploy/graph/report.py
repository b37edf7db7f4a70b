"""BuildReport: what a build did, stage by stage, as data to print, to store with results and to test against."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class TransformReport:
    """What one transform did to one graph.

    Attributes:
        name: the transform's name in the pipeline.
        stage: the stage it ran in.
        found: sites it recognised as its own.
        rewritten: sites it rewrote.
        expected: sites it should find by the graph's own evidence, or None when the graph cannot tell.
        refused: one sentence per site left alone, with the reason.
        seconds: wall time.
    """

    name: str
    stage: str
    found: int = 0
    rewritten: int = 0
    expected: int | None = None
    refused: tuple[str, ...] = ()
    seconds: float = 0.0


@dataclass
class BuildReport:
    """The whole build: transforms in order, kernels chosen, seconds per stage, resolved facts."""

    transforms: list[TransformReport] = field(default_factory=list)
    kernels: dict[str, dict[str, int]] = field(default_factory=dict)
    """op name -> provider -> number of nodes"""
    kernel_reasons: dict[str, list[str]] = field(default_factory=dict)
    """op name -> why providers were passed over"""
    seconds: dict[str, float] = field(default_factory=dict)
    """stage -> wall time, in the order the stages ran"""
    facts: dict[str, Any] = field(default_factory=dict)
    """resolved options and sizes: dtype, device, nodes per level, weight bytes, ..."""

    def rewrites(self) -> dict[str, int]:
        """Transform name -> sites rewritten (what per-model snapshots pin)."""
        return {entry.name: entry.rewritten for entry in self.transforms}
