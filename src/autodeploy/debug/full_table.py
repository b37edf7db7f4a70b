"""A full check's report as tables for people: each prompt, the perplexities, and the rules of the verdict."""

from rich.console import Console
from rich.table import Table
from rich.text import Text

from autodeploy.debug.agreement import Agreement
from autodeploy.debug.full_report import FullReport, PromptResult

PROMPT_SHOWN = 50
"""characters of a prompt that are shown"""


def print_full_check(report: FullReport, console: Console) -> None:
    """Print a report, the verdict last."""
    console.print(", ".join(f"{name} {value}" for name, value in report.facts.items()), markup=False)
    for number, result in enumerate(report.prompts, 1):
        console.print(_title(number, result), markup=False)
    console.print(_prompts(report))
    if report.perplexity is not None:
        console.print(_perplexity(report))
    for rule in report.rules:
        verdict = "passed" if rule.passed else "FAILED"
        found = f"{rule.found:.1e} {rule.unit}".rstrip()
        line = f"{verdict}: {rule.name} {found}, at most {rule.limit:.1e}"
        console.print(Text(line, style="green" if rule.passed else "bold red"))
    failed = [rule for rule in report.rules if not rule.passed]
    if failed:
        console.print(Text("FAILED: further from the reference than rounding explains", style="bold red"))
    else:
        console.print(Text("passed: as near to the reference as its dtype allows", style="green"))


def _prompts(report: FullReport) -> Table:
    """Two lines for each prompt, or one where transformers' own run is the reference."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
    table.add_column("prompt", no_wrap=True)
    table.add_column("against float32", no_wrap=True)
    for column in ("greedy", "margin", "top-1", "KL mean", "KL max"):
        table.add_column(column, justify="right", no_wrap=True)
    dtype = report.facts["dtype"]
    for number, result in enumerate(report.prompts, 1):
        table.add_row(str(number), *_cells(f"this build, {dtype}", result.ours, len(result.token_ids)))
        if result.transformers is not None:
            table.add_row("", *_cells(f"transformers, {dtype}", result.transformers, len(result.token_ids)))
    return table


def _title(number: int, result: PromptResult) -> str:
    length = f"prompt {number}, {result.num_prompt_tokens} tokens"
    if result.prompt is None:
        return length
    words = " ".join(result.prompt.split())
    return f"{length}: {words if len(words) <= PROMPT_SHOWN else words[: PROMPT_SHOWN - 3] + '...'}"


def _cells(name: str, run: Agreement, num_tokens: int) -> list[str]:
    margin = "" if run.first_margin is None else f"{run.first_margin:.1e}"
    greedy = f"{run.num_equal_tokens}/{num_tokens}"
    return [name, greedy, margin, f"{run.top_1:.1%}", f"{run.kl_mean:.0e}", f"{run.kl_max:.0e}"]


def _perplexity(report: FullReport) -> Text:
    found = report.perplexity
    assert found is not None
    own = (
        "" if found.transformers is None else f", transformers in {report.facts.get('dtype')} {found.transformers:.4f}"
    )
    return Text(
        f"perplexity of {found.source}, {found.num_tokens} tokens in windows of {found.window}: reference"
        f" {found.reference:.4f}, this build {found.ours:.4f}{own}"
    )
