"""Recognise what a model does to attention scores by its numbers: run that part of the graph, compare with the facts.

Whatever arithmetic made a mask or a bias, one that depends on positions alone is a function of the length. If it equals
causal, sliding window or chunked visibility at several lengths, plus a bias that is linear in the distance, those facts
replace it. Anything else is refused with the reason.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from autodeploy.graph.model_graph import ModelGraph
from autodeploy.ops.attention import MaskFacts, visible_keys
from autodeploy.transforms.canonicalize.evaluate import NotEvaluable, ancestors, evaluate

LENGTHS = (37, 52)
"""two lengths without a common divisor, so that a window or chunk that fits one by chance does not fit the other"""
_LONGEST = 6000
"""longest sequence a mask is evaluated for, in tokens; its matrix has the square of that"""
_MOST_SCORES = 2**26
"""most numbers, heads by queries by keys, that are run to find out what a bias does"""
HIDDEN = -9e3
"""a score that has lost this much is as good as hidden; models write -1e4, the smallest number, or -inf"""


class MaskRefused(Exception):
    """The mask is not one of the facts; the message says why."""


@dataclass(frozen=True)
class BiasFacts:
    """What a model adds to the scores: visibility, and what each head loses per token of distance (float32 `[N]`)."""

    mask: MaskFacts
    slopes: Tensor | None = None


def probe_mask(graph: ModelGraph, mask: fx.Node) -> BiasFacts:
    """The facts of a mask node `[..., T, T]`, bool (True = visible) or additive float.

    Raises:
        MaskRefused: it depends on token values or weights, or is no known shape.
    """

    def bias(length: int) -> Tensor:
        value = _matrix(_run(graph, mask, length), length)
        return torch.zeros(value.shape).masked_fill(~value, -torch.inf) if value.dtype == torch.bool else value

    return classify(graph, bias, [mask])


def classify(graph: ModelGraph, bias: Callable[[int], Tensor], masks: Iterable[fx.Node]) -> BiasFacts:
    """The facts of `bias(length)`, `[heads or 1, length, length]`, to which the graph's nodes `masks` contribute.

    Raises:
        MaskRefused: it is not one of the known shapes.
    """
    masks = list(masks)
    biases = {length: bias(length) for length in LENGTHS}
    visible = {length: _visible(value) for length, value in biases.items()}
    beyond = _beyond_constants(graph, masks)
    facts = _matching(visible | {length: _joint_visibility(graph, masks, length) for length in beyond})
    heads = max(value.shape[0] for value in biases.values())
    if facts is None and all(heads * length**2 <= _MOST_SCORES for length in beyond):
        # A matrix may join in without hiding anything; running it all, heads and all, settles that.
        facts = _matching(visible | {length: _visible(bias(length)) for length in beyond})
    if facts is None:
        raise MaskRefused("its mask is none of causal, bidirectional, sliding window or chunked")
    return BiasFacts(facts, _slopes(biases, visible))


def _matching(visible: dict[int, Tensor]) -> MaskFacts | None:
    """The facts that give this visibility at every length, or None."""
    longest = visible[max(visible)]
    window = int(longest[-1].sum())
    for facts in (
        MaskFacts(causal=True),
        MaskFacts(),
        MaskFacts(causal=True, sliding_window=window),
        MaskFacts(causal=True, chunk_size=_chunk(longest)),
    ):
        if all(torch.equal(seen, expected_visibility(facts, length)) for length, seen in visible.items()):
            return facts
    return None


def _slopes(biases: dict[int, Tensor], visible: dict[int, Tensor]) -> Tensor | None:
    """What each head loses per token of distance; None when no visible score is biased.

    Softmax does not see what is added to all scores of a query, so a bias counts relative to the query's own position.
    """
    slopes: Tensor | None = None
    for length, bias in biases.items():
        relative = (bias - bias.diagonal(dim1=1, dim2=2)[..., None]).masked_fill(~visible[length], 0.0)
        if not bool(relative.any()):
            return None
        if slopes is None:
            slopes = -relative[:, 1, 0]
        distance = torch.arange(length)[:, None] - torch.arange(length)
        expected = (-slopes[:, None, None] * distance).masked_fill(~visible[length], 0.0)
        if not torch.allclose(relative, expected, rtol=1e-4, atol=1e-4):
            raise MaskRefused("its mask adds a position bias that is not linear in the distance")
    return slopes


def _beyond_constants(graph: ModelGraph, masks: list[fx.Node]) -> list[int]:
    """A length past every number in the masks' arithmetic, where a wide window shows; none if all are small."""
    nodes = {node for mask in masks for node in ancestors(mask)}
    numbers = {number for node in nodes for number in integers(node.args)}
    for node in nodes:
        constant = getattr(graph.module, str(node.target), None) if node.op == "get_attr" else None
        if isinstance(constant, Tensor) and constant.dim() >= 2:
            numbers.update(constant.shape)  # a window may be written into a table
    largest = max((number for number in numbers if number >= LENGTHS[1]), default=None)
    if largest is None:
        return []
    if largest > _LONGEST:
        raise MaskRefused(f"its mask depends on the number {largest}, too large to evaluate what it does")
    length = largest + LENGTHS[0]
    return [length if graph.max_length is None else min(length, graph.max_length)]


def _joint_visibility(graph: ModelGraph, masks: list[fx.Node], length: int) -> Tensor:
    """What all masks together leave visible: what they treat like a query's own position, or do not push far down."""
    seen = torch.ones(length, length, dtype=torch.bool)
    for mask in masks:
        value = _run(graph, mask, length)
        if value.dim() < 2 or value.shape[-2:] != (length, length):
            continue
        value = _matrix(value, length)
        is_own = value == value[..., :1, :1]
        others = value[~is_own]
        two_valued = value.dtype == torch.bool or bool((others == others[:1]).all())
        seen &= (is_own if two_valued else value > HIDDEN).all(0)
    return seen


def integers(value: object) -> list[int]:
    """The whole numbers among a node's arguments, sizes without end left out."""
    if isinstance(value, list | tuple):
        return [number for part in value for number in integers(part)]
    return [value] if isinstance(value, int) and not isinstance(value, bool) and value < 2**31 else []


def expected_visibility(facts: MaskFacts, length: int) -> Tensor:
    """What one sequence of this length may see under the facts: bool `[length, length]`."""
    device = torch.device("cpu")
    return visible_keys(length, length, facts.causal, facts.sliding_window, facts.chunk_size, 0, device)


def _chunk(visible: Tensor) -> int:
    """The first position from which position 0 is no longer seen; the length when it always is."""
    hidden = (~visible[:, 0]).nonzero()
    return int(hidden[0]) if hidden.numel() else visible.shape[0]


def _visible(bias: Tensor) -> Tensor:
    seen = bias > HIDDEN
    if not bool((seen == seen[:1]).all()):
        raise MaskRefused("its mask differs between heads")
    return seen[0]


def _run(graph: ModelGraph, mask: fx.Node, length: int) -> Tensor:
    try:
        value = evaluate(graph, mask, length)
    except NotEvaluable as error:
        raise MaskRefused(f"its mask {error}") from error
    if not isinstance(value, Tensor):
        raise MaskRefused("its mask is no matrix of queries by keys")
    return value


def _matrix(mask: Tensor, length: int) -> Tensor:
    if mask.dim() < 2:
        raise MaskRefused("its mask is no matrix of queries by keys")
    mask = mask.reshape(-1, *mask.shape[-2:]) if mask.dim() > 2 else mask[None]
    return mask.expand(mask.shape[0], length, length)
