"""Recognise a mask that a model builds itself: evaluate its part of the graph at two lengths, compare with the facts.

Whatever arithmetic made it, a mask that depends on positions alone is a function of the length; if it equals causal,
sliding window or chunked visibility at two lengths, those facts replace it. Anything else is refused with the reason.
"""

from typing import Any

import torch
from torch import Tensor, fx

from autodeploy.graph.model_graph import ModelGraph
from autodeploy.ops.attention import MaskFacts, visible_keys

_LENGTHS = (37, 52)
"""two lengths without a common divisor, so that a window or chunk that fits one by chance does not fit the other"""
_LONGEST = 6000
"""longest sequence a mask is evaluated for, in tokens; its matrix has the square of that"""


class MaskRefused(Exception):
    """The mask is not one of the facts; the message says why."""


def probe_mask(graph: ModelGraph, mask: fx.Node) -> MaskFacts:
    """The facts of a mask node, bool (True = visible) or additive float.

    Raises:
        MaskRefused: it depends on token values or weights, differs between heads, or is no known shape.
    """
    lengths = [*_LENGTHS, *_beyond_constants(graph, mask)]
    visible = [_visible(_evaluate(graph, mask, length), length) for length in lengths]
    window = int(visible[-1][-1].sum())
    for facts in (
        MaskFacts(causal=True),
        MaskFacts(),
        MaskFacts(causal=True, sliding_window=window),
        MaskFacts(causal=True, chunk_size=_chunk(visible[-1])),
    ):
        if all(torch.equal(seen, _expected(facts, length)) for seen, length in zip(visible, lengths, strict=True)):
            return facts
    raise MaskRefused("its mask is none of causal, bidirectional, sliding window or chunked")


def _beyond_constants(graph: ModelGraph, mask: fx.Node) -> list[int]:
    """A length past every number in the mask's arithmetic, where a wide window shows; none if all are small."""
    numbers = {number for node in _ancestors(mask) for number in _integers(node.args)}
    largest = max((number for number in numbers if _LENGTHS[1] <= number < 2**31), default=None)
    if largest is None:
        return []
    if largest > _LONGEST:
        raise MaskRefused(f"its mask depends on the number {largest}, too large to evaluate what it does")
    length = largest + _LENGTHS[0]
    return [length if graph.max_length is None else min(length, graph.max_length)]


def _integers(value: object) -> list[int]:
    if isinstance(value, list | tuple):
        return [number for part in value for number in _integers(part)]
    return [value] if isinstance(value, int) and not isinstance(value, bool) else []


def _ancestors(node: fx.Node) -> set[fx.Node]:
    """The node and all it is computed from."""
    found, pending = {node}, [node]
    while pending:
        for parent in pending.pop().all_input_nodes:
            if parent not in found:
                found.add(parent)
                pending.append(parent)
    return found


def _expected(facts: MaskFacts, length: int) -> Tensor:
    device = torch.device("cpu")
    return visible_keys(length, length, facts.causal, facts.sliding_window, facts.chunk_size, 0, device)


def _chunk(visible: Tensor) -> int:
    """The first position from which position 0 is no longer seen; the length when it always is."""
    hidden = (~visible[:, 0]).nonzero()
    return int(hidden[0]) if hidden.numel() else visible.shape[0]


def _visible(mask: Tensor, length: int) -> Tensor:
    mask = mask.reshape(-1, *mask.shape[-2:]) if mask.dim() > 2 else mask[None]
    mask = mask.expand(mask.shape[0], length, length)
    if not bool((mask == mask[:1]).all()):
        raise MaskRefused("its mask differs between heads (a position bias), which no fact expresses yet")
    mask = mask[0]
    if mask.dtype == torch.bool:
        return mask
    seen, hidden = mask == 0, mask <= -1e4
    if not bool((seen | hidden).all()):
        raise MaskRefused("its additive mask holds values other than 0 and -inf (a position bias)")
    return seen


def _evaluate(graph: ModelGraph, target: fx.Node, length: int) -> Tensor:
    """The value of a node for one sequence of this length, from inputs and constants alone."""
    inputs: dict[str, Any] = {
        "input_ids": torch.zeros(1, length, dtype=torch.int64),
        "position_ids": torch.arange(length)[None],
        "cu_seqlens": torch.tensor([0, length], dtype=torch.int32),
    }
    values: dict[fx.Node, Any] = {}

    def value_of(node: fx.Node) -> Any:
        if node not in values:
            values[node] = compute(node)
        return values[node]

    def compute(node: fx.Node) -> Any:
        if node.op == "placeholder":
            if node.target == "input_ids" and not _only_its_size(node, target):
                raise MaskRefused("its mask depends on the token ids")
            return inputs[str(node.target)]
        if node.op == "get_attr":
            if str(node.target) in graph.weights:
                raise MaskRefused("its mask depends on a weight")
            return getattr(graph.module, str(node.target))
        args = fx.map_arg(node.args, value_of)
        kwargs = fx.map_arg(node.kwargs, value_of)
        assert callable(node.target)
        return node.target(*args, **kwargs)

    result = value_of(target)
    if not isinstance(result, Tensor) or result.dim() < 2:
        raise MaskRefused("its mask is no matrix of queries by keys")
    return result


def _only_its_size(node: fx.Node, target: fx.Node) -> bool:
    """Among the ancestors of `target`, the node is used for its size only."""
    ancestors = _ancestors(target)
    return all(user.target == torch.ops.aten.sym_size.int for user in node.users if user in ancestors)
