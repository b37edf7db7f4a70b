"""Part of a graph run on numbers: a node, a length and values for other nodes go in, the node's value comes out.

Masks and biases are made of positions, lengths and constants alone, so they can be run without weights and compared
with what is known. Floating point is run in float32, whatever the model's dtype, so that a scale read off the result
is not a rounded one.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from autodeploy.graph.model_graph import ModelGraph
from autodeploy.graph.verify import token_symbol

aten = torch.ops.aten

_BY_SHAPE = {
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.empty_like.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
    aten.new_empty.default,
}
"""Ops that read the shape and dtype of their first argument, not its numbers."""
_NARROW = (torch.bfloat16, torch.float16)


class NotEvaluable(Exception):
    """The value depends on token ids, on weights or on other sequences; the message says on which."""


def evaluate(graph: ModelGraph, target: fx.Node, length: int, given: Mapping[fx.Node, Tensor] | None = None) -> Any:
    """The value of a node for one sequence of `length` tokens at positions 0, 1, 2, ...

    Args:
        given: values of nodes that are not to be computed.
    Raises:
        NotEvaluable: it takes more than positions, lengths, constants and the given values.
    """
    values: dict[fx.Node, Any] = dict(given or {})
    for node in sorted(_needed(target, values)):
        values[node] = _compute(graph, node, length, values)
    return values[target]


def is_evaluable(graph: ModelGraph, target: fx.Node) -> bool:
    """Whether positions, lengths and constants alone decide a node's value."""
    inputs = [node for node in ancestors(target) if not isinstance(node.meta.get("val"), torch.SymInt)]
    return not any(
        node.target == "input_ids" if node.op == "placeholder" else str(node.target) in graph.weights
        for node in inputs
        if node.op in ("placeholder", "get_attr")
    )


def shape_at(graph: ModelGraph, value: Tensor, length: int) -> tuple[int, ...]:
    """The shape of a fake tensor when the row has `length` tokens."""
    return tuple(_size(graph, size, length) for size in value.shape)


def ancestors(node: fx.Node) -> set[fx.Node]:
    """The node and all that its numbers are computed from."""
    return _needed(node, {})


def _needed(target: fx.Node, given: Mapping[fx.Node, Any]) -> set[fx.Node]:
    if target in given:
        return set()
    found, pending = {target}, [target]
    while pending:
        node = pending.pop()
        if isinstance(node.meta.get("val"), torch.SymInt):
            continue  # a size, known from the length
        skipped = node.args[0] if node.target in _BY_SHAPE else None
        for parent in node.all_input_nodes:
            if parent is not skipped and parent not in found and parent not in given:
                found.add(parent)
                pending.append(parent)
    return found


def _compute(graph: ModelGraph, node: fx.Node, length: int, values: Mapping[fx.Node, Any]) -> Any:
    size = node.meta.get("val")
    if isinstance(size, torch.SymInt):
        return _size(graph, size, length)
    if node.op == "placeholder":
        return _input(str(node.target), length)
    if node.op == "get_attr":
        if str(node.target) in graph.weights:
            raise NotEvaluable("depends on a weight")
        return _widened(getattr(graph.module, str(node.target)))

    def value_of(argument: fx.Node) -> Any:
        if argument not in values:  # read for its shape only
            fake = argument.meta["val"]
            return torch.empty(shape_at(graph, fake, length), dtype=_wide(fake.dtype))
        return values[argument]

    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), value_of)
    assert callable(node.target)
    return _widened(node.target(*_wide_dtypes(args), **{key: _wide(value) for key, value in kwargs.items()}))


def _input(name: str, length: int) -> Tensor:
    if name == "position_ids":
        return torch.arange(length)[None]
    if name == "cu_seqlens":
        return torch.tensor([0, length], dtype=torch.int32)
    raise NotEvaluable("depends on the token ids")


def _size(graph: ModelGraph, size: int | torch.SymInt, length: int) -> int:
    if isinstance(size, int):
        return size
    value = size.node.expr.subs(token_symbol(graph), length)
    if value.free_symbols:
        raise NotEvaluable(f"depends on the size {size}")
    return int(value)


def _wide(value: Any) -> Any:
    return torch.float32 if value in _NARROW else value


def _wide_dtypes(args: Any) -> Any:
    return tuple(_wide(value) if isinstance(value, torch.dtype) else value for value in args)


def _widened(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype in _NARROW else value
