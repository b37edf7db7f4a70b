"""Rows of a profile: calls and their seconds go in; time per op against the machine's limits comes out, and as text."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from autodeploy.bench.machine import MachineLimits
from autodeploy.bench.profile.op_by_op import Call
from autodeploy.bench.profile.timeline import Timeline
from autodeploy.bench.profile.trace import Coverage
from autodeploy.debug.costs import Step, roofline
from autodeploy.graph.report import BuildReport


@dataclass(frozen=True, kw_only=True)
class Row:
    """Calls of one op by one provider with weights of one shape, in one step.

    Attributes:
        calls: how many.
        seconds: they took, altogether.
        share: of the seconds of all rows.
        limit_seconds: the least they could take: each call's operations or bytes at the machine's rates, whichever is
            longer.
        limited_by: which of the two it is for most of that time: `memory` or `operations`; empty where there is none.
        limit_share: `limit_seconds` over `seconds`; None where nothing was measured. Above 1 where what a call reads is
            still in a cache.
    """

    op: str
    provider: str
    weights: str
    calls: int
    seconds: float
    share: float
    limit_seconds: float
    limited_by: str
    limit_share: float | None


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One kind of step.

    Attributes:
        name: `prefill` or `decode`.
        step: its tokens, sequences and context.
        served_seconds: what such a step takes in the engine, sampling included, without a profiler.
        ops_seconds: what its calls take one by one.
        limit_seconds: what they would take at the machine's limits.
        rows: the longest first.
        timeline: of the served steps: of the device under the profiler, or of the thread that runs them without it,
            where a step is one piece of work.
        on_device: which of the two.
        coverage: how many of them ran from graphs.
    """

    name: str
    step: Step
    served_seconds: float
    ops_seconds: float
    limit_seconds: float
    rows: Sequence[Row]
    timeline: Timeline | None
    on_device: bool
    coverage: Coverage


def make_rows(calls: Sequence[Call], seconds: Mapping[str, float], step: Step, limits: MachineLimits) -> list[Row]:
    """Rows of a step's calls, the longest first.

    Args:
        seconds: by call name.
    """
    groups: dict[tuple[str, str, str], list[Call]] = defaultdict(list)
    for call in calls:
        groups[call.op, call.provider, call.weights].append(call)
    whole = sum(seconds[call.name] for call in calls)
    rows = []
    for (op, provider, weights), members in groups.items():
        spent = sum(seconds[call.name] for call in members)
        computing, moving, least = 0.0, 0.0, 0.0
        for call in members:
            for_flops, for_bytes = roofline(call.cost, step, limits)
            computing, moving, least = computing + for_flops, moving + for_bytes, least + max(for_flops, for_bytes)
        rows.append(
            Row(
                op=op,
                provider=provider,
                weights=weights,
                calls=len(members),
                seconds=spent,
                share=spent / whole if whole else 0.0,
                limit_seconds=least,
                limited_by="" if not least else "memory" if moving >= computing else "operations",
                limit_share=least / spent if spent else None,
            )
        )
    return sorted(rows, key=lambda row: -row.seconds)


def show(phases: Sequence[Phase], limits: MachineLimits, report: BuildReport, console: Console) -> None:
    """Print phases as text, and what the build's report says of graphs that could not be."""
    backend = str(report.facts["compile_backend"])
    for phase in phases:
        console.print(_table(phase))
        for line in remarks(phase, backend):
            console.print(line, markup=False)
        console.print()
    for line in obstacles(report):
        console.print(line, markup=False)
    console.print(
        f"limits measured in this run: {limits.memory_gb_per_second:.1f} GB/s, "
        f"{limits.matmul_gflop_per_second:.0f} GFLOP/s in {limits.dtype} ({limits.device}, {limits.threads} threads)",
        markup=False,
    )


def obstacles(report: BuildReport) -> list[str]:
    """Why some steps are not repeated, or captured as graphs."""
    captured = report.facts.get("cuda_graphs", {}).get("text", {})
    lines = [f"no graphs of steps {what}: {why}" for what, why in captured.get("not_captured", {}).items()]
    return lines + ([f"replay: {report.facts['replay']}"] if "replay" in report.facts else [])


def remarks(phase: Phase, backend: str) -> list[str]:
    """What a phase's table does not say."""
    served, ops = phase.served_seconds, phase.ops_seconds
    lines = [
        f"a served step ({backend}): {served * 1e3:.3f} ms; its calls one by one, as torch-simple runs them: "
        f"{ops * 1e3:.3f} ms; at the machine's limits: {phase.limit_seconds * 1e3:.3f} ms, "
        f"{phase.limit_seconds / served:.0%} of the served step"
    ]
    seen = phase.timeline
    if seen is not None and seen.steps > 1:
        lines.append(_seen_on_device(seen, served) if phase.on_device else _seen_on_thread(seen))
    found = phase.coverage
    counted = "" if found.counted is None else f" of {found.counted}"
    lines.append(f"graphs: {found.covered_steps} of {found.steps} steps, {found.covered}{counted} {found.unit} in them")
    return lines


def _seen_on_device(seen: Timeline, served: float) -> str:
    busy = seen.busy_seconds / seen.steps
    return (
        f"the device, {seen.steps} steps of {seen.seconds / seen.steps * 1e3:.3f} ms under the profiler: "
        f"{seen.between_share:.1%} idle between steps, {seen.within_share:.1%} within them; without it, "
        f"{busy * 1e3:.3f} of {served * 1e3:.3f} ms busy: {max(0.0, 1 - busy / served):.1%} idle"
    )


def _seen_on_thread(seen: Timeline) -> str:
    return (
        f"this thread, {seen.steps} steps of {seen.seconds / seen.steps * 1e3:.3f} ms: {seen.between_share:.1%} "
        "outside the model, for scheduling, batches and sampling"
    )


def _table(phase: Phase) -> Table:
    step = phase.step
    title = f"{phase.name}: {step.tokens} tokens of {step.sequences} sequences, context {step.context}"
    table = Table("op", "provider", "weights", "calls", title=title, title_justify="left")
    for heading in ("ms", "share", "limit, ms", "of limit"):
        table.add_column(heading, justify="right")
    table.add_column("limited by")
    for row in phase.rows:
        table.add_row(
            row.op,
            row.provider,
            row.weights,
            str(row.calls),
            f"{row.seconds * 1e3:.3f}",
            f"{row.share:.1%}",
            f"{row.limit_seconds * 1e3:.3f}" if row.limit_seconds else "",
            "" if row.limit_share is None or not row.limit_seconds else f"{row.limit_share:.0%}",
            row.limited_by,
        )
    return table
