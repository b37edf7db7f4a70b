"""The part of docs/performance.md about HTTP servers: records of servers.py go in, tables and a plot come out."""

import statistics
from pathlib import Path
from typing import Any

from peers.bars import Bar, Panel, svg
from peers.summary import OURS, number

Records = dict[str, dict[str, Any]]
"""Precision -> the record that has it."""

HEAD = """## Servers

Each as its users start it, under one client (`benchmarks/servers.py`), loaded and stopped in turns. Medians of rounds;
milliseconds are p50 / p99 within a round.
"""
TIMES = {"first token": "first_token", "between tokens": "between_tokens"}


def sections(servers: dict[str, Records], images: Path) -> list[str]:
    """Lines of the page for every model that has a record; writes the plots they show."""
    lines = [HEAD] if servers else []
    for model, records in servers.items():
        images.mkdir(parents=True, exist_ok=True)
        (images / f"servers-{model}.svg").write_text(_plot(records), encoding="utf-8")
        lines += [f"### {model}, served", "", f"![requests per second of {model}](images/servers-{model}.svg)", ""]
        for precision, record in records.items():
            samples = record["precisions"][precision]["samples"]
            lines += [*_load_table(precision, samples, record["load"]), ""]
            lines += [*_other_table(precision, samples, record["load"]), ""]
            failed = record["precisions"][precision]["failed"]
            lines += [f"- Failed: {name} {precision}: {reason}." for name, reason in failed.items()]
        for record in {record["file"]: record for record in records.values()}.values():
            busy = max(each["busy_share"] for each in record["limits"])
            lines += [
                f"- {record['machine']['cpu']}, {record['machine']['threads']} threads, at most {busy:.0%} busy with"
                f" other work; record `{record['file']}`.",
                *(f"- {name}: {each['note']}." for name, each in record["environments"].items()),
                *(f"- Not measured: {name}: {reason}." for name, reason in record["not_available"].items()),
                "",
            ]
    return lines


def _load_table(precision: str, samples: dict[str, Any], load: dict[str, Any]) -> list[str]:
    """Rising concurrency: one row per level and server."""
    heads = ["clients", precision, "requests/s", "tokens/s", *(f"{name}, ms" for name in TIMES)]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for level in load["levels"]:
        for name, figures in samples.items():
            begin = f"clients_{level}_"
            if f"{begin}requests_per_second" not in figures:
                continue
            rates = [_median(figures, f"{begin}{rate}_per_second") for rate in ("requests", "tokens")]
            times = [_times(figures, f"{begin}{key}") for key in TIMES.values()]
            lines.append(f"| {level} | {_bold(name)} | {' | '.join([*rates, *times])} |")
    return lines


def _other_table(precision: str, samples: dict[str, Any], load: dict[str, Any]) -> list[str]:
    """Shared prefixes, repetitive text, guided answers: one row per server."""
    guided = load["guided_clients"]
    heads = [precision, f"first token, {load['shared_prefix']:,} tokens of their own, ms", "shared, ms"]
    heads += ["repetitive text, tokens/s", *(f"guided, {clients} clients" for clients in guided)]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for name, figures in samples.items():
        cells = [_times(figures, f"prefix_{kind}_first_token") for kind in ("apart", "shared")]
        cells.append(_median(figures, "repetitive_tokens_per_second"))
        for clients in guided:
            values = figures.get(f"guided_{clients}_overhead")
            cells.append(f"{statistics.median(values):+.1%} per token" if values else "-")
        lines.append(f"| {_bold(name)} | {' | '.join(cells)} |")
    return lines


def _plot(records: Records) -> str:
    """Requests per second, one panel per level."""
    first = next(iter(records.values()))
    panels = []
    for level in first["load"]["levels"]:
        bars = []
        for precision, record in records.items():
            for name, figures in record["precisions"][precision]["samples"].items():
                if values := figures.get(f"clients_{level}_requests_per_second"):
                    middle, label = statistics.median(values), f"{name} {precision}"
                    bars.append(Bar(label=label, value=middle, low=min(values), high=max(values), ours=name == OURS))
        if bars:
            panels.append(Panel(title=f"requests/s, {level} clients", bars=bars))
    return svg(panels)


def _bold(name: str) -> str:
    return f"**{name}**" if name.startswith(OURS) else name


def _median(figures: dict[str, list[float]], figure: str) -> str:
    values = figures.get(figure)
    return number(statistics.median(values)) if values else "-"


def _times(figures: dict[str, list[float]], begin: str) -> str:
    """p50 / p99 in milliseconds."""
    both = [figures.get(f"{begin}_p{percentile}_seconds") for percentile in (50, 99)]
    return " / ".join(number(1e3 * statistics.median(values)) if values else "-" for values in both)
