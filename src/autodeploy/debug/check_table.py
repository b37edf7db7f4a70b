"""A check's report as a table for people: one line per transform, and what to know about those that are not green."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from autodeploy.debug.check_report import FAILED, INCONCLUSIVE, PASSED, CheckReport, CheckRow

COLOURS = {PASSED: "green", INCONCLUSIVE: "yellow", FAILED: "bold red"}


def print_check(report: CheckReport, console: Console) -> None:
    """Print a report; every line that did not pass is explained below the table."""
    console.print(", ".join(f"{name} {value}" for name, value in report.facts.items()), markup=False)
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
    table.add_column("transform", no_wrap=True)
    for column in ("expected", "found", "rewrote", "refused", "error", "limit"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    previous = ""
    for row in report.rows:
        if row.stage != previous:
            table.add_row(Text(row.stage, style="dim italic"))
        table.add_row(*_cells(row))
        previous = row.stage
    console.print(table)
    for row in report.rows:
        if row.transform is not None:
            for reason in row.transform.refused:
                console.print(f"{row.name} refused: {reason}", markup=False)
        if row.note:
            console.print(Text(f"{row.name}: {row.note}", style=COLOURS[row.verdict]))
    console.print(_summary(report))


def _cells(row: CheckRow) -> list[str | Text]:
    counts: list[str | Text] = ["", "", "", ""]
    if row.transform is not None:
        entry = row.transform
        expected = "" if entry.expected is None else str(entry.expected)
        counts = [expected, str(entry.found), str(entry.rewritten), str(len(entry.refused))]
    error = "" if row.error is None else _short(row.error)
    tolerance = "" if row.tolerance is None else _short(row.tolerance)
    return [f"  {row.name}", *counts, error, tolerance, Text(row.verdict, style=COLOURS[row.verdict])]


def _short(value: float) -> str:
    return f"{value:.0e}" if value else "0"


def _summary(report: CheckReport) -> Text:
    if report.culprit is not None:
        culprit = report.culprit
        return Text(f"FAILED: {culprit.name} (stage {culprit.stage}) is the first to go wrong", style=COLOURS[FAILED])
    last = next((row.against_original for row in reversed(report.rows) if row.against_original is not None), None)
    if last is None:
        return Text("nothing was compared", style=COLOURS[INCONCLUSIVE])
    text = (
        f"passed: against the model's own code in float32 the logits are off by {last.relative_error:.1e} of the"
        f" largest, KL divergence {last.kl_divergence:.1e} nats, top-1 agreement {last.top_1_agreement:.1%}"
    )
    return Text(text, style=COLOURS[PASSED])
