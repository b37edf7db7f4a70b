"""The page of `autodeploy inspect`: an inspection goes in, one HTML file comes out that needs no network.

Layers, each transform's before and after, kernels with reasons, bytes, operations, and the least time of each part on a
machine of given rates. The template, its style and its script lie in `page_template/`.
"""

import dataclasses
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from autodeploy.bench.machine import MachineLimits, measure
from autodeploy.checkpoint.load import weight_bytes
from autodeploy.debug.costs import Cost, Step, roofline, total
from autodeploy.debug.inspect import Call, Inspection
from autodeploy.errors import ConfigError
from autodeploy.ops.state import PagedState, SlotState, StateSpec

TEMPLATES = Path(__file__).parent / "page_template"
CONTEXT_TOKENS = 1024
"""context of the first figures; the page lets one choose another"""


def machine_limits(inspection: Inspection, rates: tuple[float, float] | None = None) -> MachineLimits:
    """Rates that times are told for: GB/s and GFLOP/s as given, else those of this machine's device.

    Raises:
        ConfigError: a rate that is not positive.
    """
    facts = inspection.report.facts
    if rates is None:
        return measure(torch.device(facts["device"]), getattr(torch, facts["dtype"]))
    if min(rates) <= 0:
        raise ConfigError(f"rates are GB/s and GFLOP/s, both above 0; got {rates[0]} and {rates[1]}")
    return MachineLimits(
        device=facts["device"],
        dtype=facts["dtype"],
        threads=torch.get_num_threads(),
        memory_gb_per_second=rates[0],
        matmul_gflop_per_second=rates[1],
        matmul_size=0,
    )


def write_page(inspection: Inspection, limits: MachineLimits, path: Path) -> None:
    """Write the page, making its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(inspection, limits), encoding="utf-8")


def render(inspection: Inspection, limits: MachineLimits) -> str:
    """The page as HTML."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"si": si, "num_bytes": num_bytes, "seconds": seconds}
    kind_of = {layer: index for index, kind in enumerate(inspection.kinds) for layer in kind.layers}
    layers = [layer for layer in dict.fromkeys(call.layer for call in inspection.calls) if layer in kind_of]
    return environment.get_template("page.html.j2").render(
        style=(TEMPLATES / "page.css").read_text(encoding="utf-8"),
        script=(TEMPLATES / "page.js").read_text(encoding="utf-8"),
        inspection=inspection,
        report=inspection.report,
        figures=_figures(inspection, limits),
        strip=[(layer, kind_of[layer]) for layer in layers],
        calls=_calls_by_example(inspection),
        states=_states(inspection.graph.states),
        weights=_weights(inspection),
        stages=_stages(inspection),
        data={
            "parts": _parts(inspection, kind_of),
            "limits": {"bytes": limits.memory_gb_per_second, "flops": limits.matmul_gflop_per_second},
            "context": CONTEXT_TOKENS,
        },
        limits=limits,
    )


def _figures(inspection: Inspection, limits: MachineLimits) -> list[tuple[str, str, str]]:
    """Headline figures: label, value, explanation."""
    costs = total(call.cost for call in inspection.calls)
    specs = inspection.graph.states
    per_token = sum(spec.bytes_per_token for spec in specs if isinstance(spec, PagedState))
    per_sequence = sum(spec.bytes_per_slot for spec in specs if isinstance(spec, SlotState))
    changes = inspection.changes
    decode, prefill = Step.decode(1, CONTEXT_TOKENS), Step.prefill(CONTEXT_TOKENS)
    return [
        ("parameters", si(sum(numel for numel, _ in inspection.parameters.values())), "each tensor once"),
        ("weights", num_bytes(sum(size for _, size in inspection.parameters.values())), "in the model's dtype"),
        ("cache per token", num_bytes(per_token), "keys, values, latents, in pages"),
        ("state per sequence", num_bytes(per_sequence), "recurrent states, convolution windows"),
        ("operations per token", si(sum(c.flops_per_token + c.flops_per_row for c in costs)), "attention's keys apart"),
        ("nodes", f"{changes[0].nodes} → {changes[-1].nodes}", "captured → lowered"),
        ("decode, at least", seconds(least_seconds(inspection, decode, limits)), f"a token after {CONTEXT_TOKENS}"),
        ("prefill, at least", seconds(least_seconds(inspection, prefill, limits)), f"{CONTEXT_TOKENS} tokens"),
    ]


def least_seconds(inspection: Inspection, step: Step, limits: MachineLimits) -> float:
    """The least time of a step: of each call the time for its operations or for its bytes, whichever is longer."""
    return sum(max(roofline(call.cost, step, limits)) for call in inspection.calls)


def _calls_by_example(inspection: Inspection) -> dict[str, list[Call]]:
    """The calls of each example layer, and under `` those that belong to no layer."""
    shown = {kind.example for kind in inspection.kinds}
    calls: dict[str, list[Call]] = defaultdict(list)
    for call in inspection.calls:
        if call.layer is None or call.layer in shown:
            calls[call.layer or ""].append(call)
    return dict(calls)


def _stages(inspection: Inspection) -> dict[str, list[Any]]:
    stages: dict[str, list[Any]] = defaultdict(list)
    for change in inspection.changes[1:]:
        stages[change.stage].append(change)
    return dict(stages)


def _states(specs: list[StateSpec]) -> list[dict[str, Any]]:
    """State specs of one shape together: how many, and what they take."""
    groups: dict[tuple[Any, ...], list[StateSpec]] = defaultdict(list)
    for spec in specs:
        groups[(spec.group, tuple(spec.shape), spec.dtype)].append(spec)
    rows = []
    for (group, shape, dtype), members in groups.items():
        each = [s.bytes_per_token if isinstance(s, PagedState) else s.bytes_per_slot for s in members]
        rows.append(
            {
                "group": group,
                "shape": " × ".join(map(str, shape)),
                "dtype": str(dtype).removeprefix("torch."),
                "count": len(members),
                "bytes": sum(each),
                "per": "token" if isinstance(members[0], PagedState) else "sequence",
                "example": members[0].name,
            }
        )
    return rows


def _weights(inspection: Inspection) -> list[dict[str, Any]]:
    """Bytes of final weights by what they are part of, largest first."""
    part_of = {name: _part_name(call) for call in reversed(inspection.calls) for name in call.reads}
    groups: dict[str, list[int]] = defaultdict(list)
    for name, recipe in inspection.graph.weights.items():
        groups[part_of.get(name, "other")].append(weight_bytes(recipe))
    largest = max(map(sum, groups.values()), default=1)
    rows = sorted(groups.items(), key=lambda item: -sum(item[1]))
    return [{"part": p, "tensors": len(sizes), "bytes": sum(sizes), "share": sum(sizes) / largest} for p, sizes in rows]


def _parts(inspection: Inspection, kind_of: dict[str, int]) -> list[dict[str, Any]]:
    """What the script needs to compute times: costs of each part, those of all layers of a kind together."""
    groups: dict[tuple[int, str], list[Call]] = defaultdict(list)
    for call in inspection.calls:
        kind = -1 if call.layer is None else kind_of.get(call.layer, -1)
        groups[kind, _part_name(call)].append(call)
    return [
        {
            "kind": kind,
            "name": name,
            "calls": [
                # Alike calls of many layers are one entry: times are summed call by call.
                {"count": count, **dataclasses.asdict(cost)}
                for cost, count in _counted(call.cost for call in calls).items()
            ],
        }
        for (kind, name), calls in sorted(groups.items(), key=lambda item: item[0][0])
    ]


def _counted(costs: Any) -> dict[Cost, int]:
    counts: dict[Cost, int] = defaultdict(int)
    for cost in costs:
        counts[cost] += 1
    return dict(counts)


def _part_name(call: Call) -> str:
    """The module right below the layer, or below the model for what belongs to none."""
    parts = [part for part in call.module.split(".") if part]
    if call.layer is None:
        return parts[-1] if parts else "(model)"
    return parts[0] if parts else "(layer)"


def si(value: float) -> str:
    """12 345 678 -> 12.3 M"""
    for unit in ("", " K", " M", " G", " T"):
        if abs(value) < 1000:
            return f"{value:.3g}{unit}"
        value /= 1000
    return f"{value:.3g} P"


def num_bytes(value: float) -> str:
    """12 345 678 -> 11.8 MiB"""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(value) < 1024:
            return (
                f"{value:.0f} {unit}"
                if unit == "B"
                else f"{value:.3g} {unit}"
                if value < 100
                else f"{value:.0f} {unit}"
            )
        value /= 1024
    return f"{value:.3g} TiB"


def seconds(value: float) -> str:
    """0.00123 -> 1.23 ms"""
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "µs")):
        if value * factor >= 1:
            return f"{value * factor:.3g} {unit}"
    return f"{value * 1e9:.3g} ns"
