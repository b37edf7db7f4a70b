"""CheckReport: what `check` found, row by row, as data to print and to test against."""

from dataclasses import dataclass, field
from typing import Any

from autodeploy.debug.compare import Difference
from autodeploy.graph.report import TransformReport

PASSED, FAILED, INCONCLUSIVE = "passed", "FAILED", "inconclusive"


@dataclass(frozen=True, kw_only=True)
class CheckRow:
    """One thing that was checked.

    Attributes:
        stage: the stage of the build.
        name: a transform, or what else ran there.
        transform: what the transform said it did; None where no transform ran.
        error: largest relative error of the logits against the step before, over all ways of running; None if not run.
        tolerance: how large that may be.
        against_original: the logits against those of the original module in float32.
        verdict: `passed`, `FAILED` or `inconclusive`.
        note: why, and where.
    """

    stage: str
    name: str
    transform: TransformReport | None = None
    error: float | None = None
    tolerance: float | None = None
    against_original: Difference | None = None
    verdict: str = PASSED
    note: str = ""


@dataclass
class CheckReport:
    """Everything that was checked, in the order of the build.

    Attributes:
        rows: one per transform and per other step.
        facts: what was run: model, dtype, device, backend, nodes and parameters.
    """

    rows: list[CheckRow] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """True when nothing failed. What proved nothing is no failure; its row says so."""
        return self.culprit is None

    @property
    def culprit(self) -> CheckRow | None:
        """The first row that failed."""
        return next((row for row in self.rows if row.verdict == FAILED), None)
