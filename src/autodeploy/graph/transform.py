"""Transform: one idea that changes a graph, and the contract every one of them keeps.

A transform says how many sites it expected by the graph's own evidence, how many it found, how many it rewrote, and why
it left the others. Timing, clean-up, dumping and strictness live here; a subclass contains its idea and nothing else.
"""

import re
import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, final

import torch

from autodeploy.errors import AutoDeployError, GraphLevelError, TransformError
from autodeploy.graph.levels import Level
from autodeploy.graph.model_graph import ModelGraph
from autodeploy.graph.report import TransformReport
from autodeploy.graph.verify import verify


@dataclass(frozen=True, kw_only=True)
class TransformResult:
    """What `apply` did. `refused` holds one sentence per site left alone."""

    found: int = 0
    rewritten: int = 0
    expected: int | None = None
    refused: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Transform(ABC):
    """A change to a graph. Fields are its options; every transform can be switched off by name.

    The level of the graph stays as it is unless the stage says otherwise, and so do the numbers: a transform that may
    change bits within the ops' tolerances says so in its docstring.
    """

    enabled: bool = True

    tolerance: ClassVar[Mapping[torch.dtype, float]] = {
        torch.float32: 2e-5,
        torch.bfloat16: 8e-2,
        torch.float16: 2e-2,
    }
    """How far logits may move, as a share of the largest: sums in another order. `check` holds a transform to it."""

    @classmethod
    def name(cls) -> str:
        """The name in reports and options: the class name in snake case."""
        return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", cls.__name__).lower()

    @abstractmethod
    def apply(self, graph: ModelGraph) -> TransformResult:
        """Change the graph in place. Need not clean up or recompile."""

    @final
    def run(self, graph: ModelGraph, stage: str = "") -> TransformReport:
        """Apply, clean up, and report."""
        start = time.perf_counter()
        try:
            result = self.apply(graph)
            graph.clean()
        except AutoDeployError:
            raise
        except Exception as error:
            raise TransformError(f"transform {self.name()} failed on graph {graph.name!r}: {error}") from error
        return TransformReport(
            name=self.name(),
            stage=stage,
            found=result.found,
            rewritten=result.rewritten,
            expected=result.expected,
            refused=result.refused,
            seconds=time.perf_counter() - start,
        )


@dataclass(frozen=True)
class Stage:
    """Transforms that together bring a graph to a level (or keep the one it has)."""

    name: str
    transforms: tuple[Transform, ...]
    ensures: Level | None = None

    def run(self, graph: ModelGraph, *, strict: bool = False) -> Iterable[TransformReport]:
        """Run the enabled transforms in order, then verify the level.

        Raises:
            GraphLevelError: the level was not reached, with what the transforms refused and why.
            TransformError: strict, and a transform left a site it should have rewritten.
        """
        refused: list[str] = []
        for transform in self.transforms:
            if not transform.enabled:
                continue
            report = transform.run(graph, self.name)
            if strict and (report.refused or (report.expected is not None and report.rewritten < report.expected)):
                raise TransformError(
                    f"{report.name} expected {report.expected} sites, found {report.found}, rewrote {report.rewritten}"
                    f" (strict): {'; '.join(report.refused) or 'the others did not match'}"
                )
            yield report
            refused.extend(report.refused)
        if self.ensures is None:
            return
        try:
            verify(graph, self.ensures)
        except GraphLevelError as error:
            raise GraphLevelError(". ".join([str(error), *refused])) from error


@dataclass(frozen=True)
class Pipeline:
    """Stages in order."""

    stages: tuple[Stage, ...] = field(default_factory=tuple)

    def transforms(self) -> dict[str, Transform]:
        """Every transform by name."""
        return {transform.name(): transform for stage in self.stages for transform in stage.transforms}
