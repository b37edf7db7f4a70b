"""What a record of peers.py says: one of its precisions goes in, medians, ratios and shares of the limit come out."""

import json
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OURS = "AutoDeploy"
IDLE_SHARE = 0.1
"""Of the processors' time, at most, may others take before any round of a run that counts."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """A figure of a record.

    Attributes:
        label: its column's head, with `{requests}` for how many there were at once.
        scale: from the record's unit to the label's.
        smaller_is_better: times and memory; everything else is a rate.
        limit: the machine's limit that bounds it; None where no single one does.
    """

    label: str
    scale: float = 1.0
    smaller_is_better: bool = False
    limit: str | None = None


FIGURES = {
    "decode": Figure(label="decode, tok/s", limit="memory_gb_per_second"),
    "prefill_1024": Figure(label="prefill 1,024, tok/s", limit="matmul_gflop_per_second"),
    "prefill_2048": Figure(label="prefill 2,048, tok/s", limit="matmul_gflop_per_second"),
    "requests": Figure(label="{requests} requests, output tok/s", limit="matmul_gflop_per_second"),
    "first_token_seconds": Figure(label="first token after 128, ms", scale=1e3, smaller_is_better=True),
    "start_seconds": Figure(label="second start to first token, s", smaller_is_better=True),
    "one_peak_bytes": Figure(label="peak, one stream, MB", scale=1e-6, smaller_is_better=True),
    "requests_peak_bytes": Figure(label="peak, {requests} requests, MB", scale=1e-6, smaller_is_better=True),
}


def newest(results: Path, benchmark: str) -> tuple[dict[str, dict[str, dict[str, Any]]], list[str]]:
    """Model -> precision -> the newest record of an idle machine that has it; and the files of a busy machine."""
    records: dict[str, dict[str, dict[str, Any]]] = {}
    busy = []
    for path in sorted(results.glob(f"{benchmark}-*.json"), key=lambda path: path.stem.rsplit("_", 1)[-1]):
        record = json.loads(path.read_text(encoding="utf-8"))
        if max(each["busy_share"] for each in record["limits"]) > IDLE_SHARE:
            busy.append(path.name)
        else:
            found = dict.fromkeys(record["precisions"], record | {"file": path.name})
            records.setdefault(record["model"], {}).update(found)
    return records, busy


def label(figure: str, records: Iterable[dict[str, Any]]) -> str:
    """A figure's label for records, whose loads may differ."""
    counts = sorted({record["load"]["num_requests"] for record in records})
    return FIGURES[figure].label.format(requests=" or ".join(map(str, counts)))


def samples(group: dict[str, Any], figure: str) -> dict[str, list[float]]:
    """Subject -> its values of a figure, in the unit of the figure's label."""
    scale = FIGURES[figure].scale
    found = {name: figures.get(figure, []) for name, figures in group["samples"].items()}
    return {name: [scale * value for value in values] for name, values in found.items() if values}


def advantage(values: dict[str, list[float]], figure: str) -> float | None:
    """How many times better our median is than the best peer's; None without both."""
    medians = {name: statistics.median(each) for name, each in values.items()}
    ours, peers = medians.pop(OURS, None), list(medians.values())
    if ours is None or not peers:
        return None
    return min(peers) / ours if FIGURES[figure].smaller_is_better else ours / max(peers)


def share(record: dict[str, Any], group: dict[str, Any], figure: str) -> float | None:
    """Our part of what the machine allows; None for a figure that no single limit bounds.

    A decode step reads all weights but looked-up tables, and the state of the tokens so far; a prompt costs its matrix
    products, and so do many requests at once, of prompts and answers of average length. Attention is left out. The
    limits are the medians of those measured in the same run.
    """
    facts, limit, values = group["facts"].get(OURS), FIGURES[figure].limit, samples(group, figure).get(OURS)
    if not facts or limit is None or not values:
        return None
    if figure == "decode":
        prompt, answer = record["load"]["decode"]
        context = prompt + answer / 2
        state = facts["state_bytes_per_token"] * context + facts["state_bytes_per_sequence"]
        each = facts["step_weight_bytes"] + state
    elif figure == "requests":
        prompt, answer = (sum(record["load"][bounds]) / 2 for bounds in ("prompts", "outputs"))
        each = facts["flops_per_token"] * (prompt + answer) / answer + facts["flops_per_logits_row"]
    else:
        each = facts["flops_per_token"] + facts["flops_per_logits_row"] / int(figure.rsplit("_", 1)[1])
    return statistics.median(values) * each / 1e9 / statistics.median(found[limit] for found in record["limits"])


def number(value: float) -> str:
    """Three digits, more before the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def agreement(tokens: list[list[int]], reference: list[list[int]]) -> float:
    """Tokens that two subjects' answers have in common at their beginning, on average over prompts both answered."""
    common = [_common(*each) for each in zip(tokens, reference, strict=False)]  # who is slow answers the first only
    return sum(common) / len(common)


def _common(left: list[int], right: list[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=True)) if a != b), len(left))
