"""Which layers of a model to keep: its config goes in, every field that speaks of layers comes out for fewer of them.

One layer of each kind stays, in their order, and two at least. A layer's kind is what all the fields that have one
entry per layer say of it together: lists, lists of layer numbers, counts of first or last layers, overrides of single
layers. Where a property computes kinds from a period instead, the shortest run of first layers with all of them stays.
"""

import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from transformers import PreTrainedConfig

LAYER_COUNTS = (
    "num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks", "decoder_layers", "num_decoder_layers",
    "encoder_layers", "num_encoder_layers", "depth", "num_layers_per_stack",
)  # fmt: skip
"""the names under which configs keep their number of layers"""
MIN_LAYERS, MAX_LAYERS = 2, 8

_NOT_PER_LAYER = re.compile(r"multiplier|section|shape")
_FIRST_LAYERS = re.compile(r"first_k_dense_replace|num_dense_layers|moe_layer_start_index")
_LAST_LAYERS = re.compile(r"num_kv_shared_layers")
_LAYER_NUMBERS = re.compile(r"(layers|layer_ids|idxs|indices|indexes)$")
_SHARED = "'hybrid'"
"""layers of this kind may share the weights of one block, which only two of them show"""
_END = re.compile(r"moe_layer_end_index")


@dataclass(frozen=True)
class Depth:
    """New values of the fields that speak of layers.

    Attributes:
        values: by field.
        per_layer: overrides of single layers, by their new number; None where the config has none.
    """

    values: Mapping[str, Any] = field(default_factory=dict)
    per_layer: Mapping[int, Mapping[str, Any]] | None = None


def kept_layers(config: PreTrainedConfig, values: Mapping[str, Any]) -> Depth:
    """Choose the layers to keep.

    Args:
        config: before.
        values: its fields that can be set.
    """
    counts = {name: values[name] for name in LAYER_COUNTS if isinstance(values.get(name), int) and values[name]}
    total = getattr(config, "num_hidden_layers", None) or next(iter(counts.values()), None)
    if not isinstance(total, int) or total < 1:
        return Depth()
    per_stack = counts.pop("num_layers_per_stack", None)
    if per_stack is not None:  # the stacks are run several times over, and the number of layers counts every run
        return Depth({"num_layers_per_stack": 1, **{name: count // per_stack for name, count in counts.items()}})
    facts = {name: column for name, value in values.items() if (column := _column(name, value, total)) is not None}
    overrides = _overrides(config)
    kinds = _rows([*facts.values(), [repr(overrides.get(at)) for at in range(total)]], total)
    kept = _choose(kinds, _rows(_derived(config, total), total))
    new: dict[str, Any] = {
        name: len(kept) if count == total else min(count, MIN_LAYERS) for name, count in counts.items()
    }
    new |= {name: _selected(name, values[name], column, kept) for name, column in facts.items()}
    new |= {name: min(value, len(kept) - 1) for name, value in values.items() if _END.search(name) and value}
    per_layer = {at: overrides[old] for at, old in enumerate(kept) if old in overrides}
    return Depth(new, per_layer if overrides else None)


def _column(name: str, value: Any, total: int) -> list[Any] | None:
    """What a field says of each layer; None for a field that speaks of something else."""
    if isinstance(value, int) and not isinstance(value, bool):
        if _FIRST_LAYERS.fullmatch(name):
            return [at < value for at in range(total)]
        return [at >= total - value for at in range(total)] if _LAST_LAYERS.fullmatch(name) else None
    if not isinstance(value, list | tuple) or _NOT_PER_LAYER.search(name):
        return None
    if _is_pattern(value):
        expanded = [kind for kinds, count in value for kind in kinds * count]
        return expanded if len(expanded) == total else None
    if _is_layer_numbers(name, value, total):
        return [at in value for at in range(total)]
    return list(value) if len(value) == total and total > MIN_LAYERS else None


def _is_layer_numbers(name: str, value: Sequence[Any], total: int) -> bool:
    """A rising list of numbers below the number of layers; an empty one says nothing."""
    if not value or not _LAYER_NUMBERS.search(name) or any(type(entry) is not int for entry in value):
        return False
    return all(a < b for a, b in itertools.pairwise(value)) and value[0] >= 0 and value[-1] < total


def _is_pattern(value: Sequence[Any]) -> bool:
    """`[[["a", "b"], 3], ...]`: each inner list that many times."""
    return bool(value) and all(
        isinstance(part, list | tuple) and len(part) == 2 and isinstance(part[0], list) and isinstance(part[1], int)
        for part in value
    )


def _selected(name: str, value: Any, column: Sequence[Any], kept: Sequence[int]) -> Any:
    """The field's value when only the kept layers are left."""
    chosen = [column[at] for at in kept]
    if isinstance(value, int):
        return sum(chosen)
    if _is_pattern(value):
        return [[chosen, 1]]
    if _is_layer_numbers(name, value, len(column)):
        return [at for at, is_listed in enumerate(chosen) if is_listed]
    return chosen


def _overrides(config: PreTrainedConfig) -> dict[int, dict[str, Any]]:
    if not config.is_heterogeneous:
        return {}
    return {int(at): dict(changes) for at, changes in config.to_dict()["per_layer_config"].items()}


def _derived(config: PreTrainedConfig, total: int) -> list[list[Any]]:
    """Lists with one entry per layer that properties of the config's class compute."""
    names = {
        name
        for cls in type(config).__mro__
        if issubclass(cls, PreTrainedConfig) and cls is not PreTrainedConfig
        for name, member in vars(cls).items()
        if isinstance(member, property) and "layer" in name
    }
    values = [getattr(config, name) for name in sorted(names)]
    return [list(value) for value in values if isinstance(value, list | tuple) and len(value) == total]


def _rows(columns: Sequence[Sequence[Any]], total: int) -> list[str]:
    return [repr([column[at] for column in columns]) for at in range(total)]


def _choose(kinds: Sequence[str], derived: Sequence[str]) -> list[int]:
    """Layers to keep: the first of each kind, or the first so many when a kind hangs on the layer's number."""
    implied = {kind: entry for kind, entry in zip(kinds, derived, strict=True)}
    least = min(MIN_LAYERS, len(kinds))
    if any(implied[kind] != entry for kind, entry in zip(kinds, derived, strict=True)):
        both = list(zip(kinds, derived, strict=True))
        return list(range(max(least, max(both.index(kind) for kind in set(both)) + 1)))
    seen: Counter[str] = Counter()
    first = []
    for at, kind in enumerate(kinds):
        if seen[kind] < (2 if _SHARED in kind else 1):
            first.append(at)
        seen[kind] += 1
    del first[MAX_LAYERS:]
    spare = (at for at in range(len(kinds)) if at not in first)
    while len(first) < least:
        first.append(next(spare))
    return sorted(first)
