"""A bias that depends on what the tokens say: from a `[.., T, T]` node to rows with an entry per key or per distance.

Two kinds are known. A bias by key adds to every score of a key a number computed from that key's token. A bias by
distance reads, for each query, a table of its own by the distance to the key. Both are recognised by running the part
of the graph that makes the bias on random numbers.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from autodeploy.graph.model_graph import ModelGraph
from autodeploy.graph.verify import count_token_dims, token_symbol
from autodeploy.ops.attention import MaskFacts
from autodeploy.transforms.canonicalize.evaluate import NotEvaluable, evaluate, is_evaluable, shape_at
from autodeploy.transforms.canonicalize.mask_probe import (
    HIDDEN,
    LENGTHS,
    BiasFacts,
    MaskRefused,
    classify,
    expected_visibility,
    integers,
    probe_mask,
)

aten = torch.ops.aten

_LONGEST_TABLE = 2048
"""entries of a table by distance beyond which a bias is refused"""


@dataclass(frozen=True)
class BiasRows:
    """A bias in parts: what positions alone decide, and rows from the tokens.

    Attributes:
        facts: visibility and slopes.
        by_key: `[1, T, M]`, added to all scores of a key, M a divisor of the number of query heads; or None.
        by_distance: `[1, T, N or 1, D]` as `attention` takes it, or None.
    """

    facts: BiasFacts
    by_key: fx.Node | None = None
    by_distance: fx.Node | None = None


def read_bias(graph: ModelGraph, bias: fx.Node, before: fx.Node) -> BiasRows:
    """What an additive bias or mask node `[1, heads, T, T]` says.

    Raises:
        MaskRefused: it is none of the known kinds.
    """
    region = _matrices(graph, bias)
    sources = _sources(graph, region)
    if not sources:
        return BiasRows(probe_mask(graph, bias))
    symbol = token_symbol(graph)
    if len(sources) == 1 and count_token_dims(sources[0].meta["val"], symbol) == 1:
        rows = _by_key(graph, bias, region, sources[0], before)
        if rows is not None:
            return rows
    facts = _without_sources(graph, bias, region, sources)
    return BiasRows(facts, by_distance=_by_distance(graph, bias, region, sources, facts.mask, before))


def _matrices(graph: ModelGraph, bias: fx.Node) -> list[fx.Node]:
    """The token-by-token values that the bias is made of, in order."""
    symbol = token_symbol(graph)
    seen, pending = {bias}, [bias]
    while pending:
        for parent in pending.pop().all_input_nodes:
            value = parent.meta.get("val")
            if parent not in seen and isinstance(value, Tensor) and count_token_dims(value, symbol) >= 2:
                seen.add(parent)
                pending.append(parent)
    return sorted(seen)


def _sources(graph: ModelGraph, region: list[fx.Node]) -> list[fx.Node]:
    """Floating-point inputs of the region that positions alone do not decide."""
    inside = set(region)
    parents = dict.fromkeys(parent for node in region for parent in node.all_input_nodes if parent not in inside)
    return [parent for parent in parents if _is_floating(parent) and not is_evaluable(graph, parent)]


def _is_floating(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def _without_sources(graph: ModelGraph, bias: fx.Node, region: list[fx.Node], sources: list[fx.Node]) -> BiasFacts:
    """What positions alone decide: the facts of the bias when what comes from the tokens is zero."""
    tainted = set(sources)
    masks: list[fx.Node] = []
    for node in region:
        if any(parent in tainted for parent in node.all_input_nodes):
            tainted.add(node)
            masks.extend(parent for parent in node.all_input_nodes if parent in region and parent not in tainted)
    return classify(graph, lambda length: _value(graph, bias, length, _zeros(graph, sources, length)), masks)


def _value(graph: ModelGraph, node: fx.Node, length: int, given: Mapping[fx.Node, Tensor]) -> Tensor:
    """A node's value, `[heads, length, length or table]`; a bool mask as what it adds."""
    try:
        value: Tensor = evaluate(graph, node, length, given)
    except NotEvaluable as error:
        raise MaskRefused(f"its bias {error}") from error
    value = torch.zeros(value.shape).masked_fill(~value, -torch.inf) if value.dtype == torch.bool else value
    return value.reshape(-1, *value.shape[-2:])


def _random(graph: ModelGraph, sources: list[fx.Node], length: int) -> dict[fx.Node, Tensor]:
    generator = torch.Generator().manual_seed(length)
    return {s: torch.randn(shape_at(graph, s.meta["val"], length), generator=generator) for s in sources}


def _zeros(graph: ModelGraph, sources: list[fx.Node], length: int) -> dict[fx.Node, Tensor]:
    return {source: torch.zeros(shape_at(graph, source.meta["val"], length)) for source in sources}


def _by_key(
    graph: ModelGraph, bias: fx.Node, region: list[fx.Node], source: fx.Node, before: fx.Node
) -> BiasRows | None:
    """The bias as positions alone plus `source`, a number per key and head; None when it is not that."""
    dims = [d for d, size in enumerate(source.meta["val"].shape) if not isinstance(size, int)]
    heads = 0

    for length in LENGTHS:
        given = _random(graph, [source], length)
        value = _value(graph, bias, length, given)
        zero = _value(graph, bias, length, _zeros(graph, [source], length))
        rows = given[source].movedim(dims[0], -1).reshape(-1, length)
        heads = rows.shape[0]
        if value.shape[0] % heads:
            return None
        rows = rows.repeat_interleave(value.shape[0] // heads, 0)[:, None].expand_as(value)
        seen = zero > HIDDEN
        if not torch.allclose((value - zero)[seen], rows[seen], rtol=1e-4, atol=1e-4):
            return None
    facts = _without_sources(graph, bias, region, [source])
    order = [dims[0], *(d for d in range(source.meta["val"].dim()) if d != dims[0])]
    tokens_first = graph.call(aten.permute.default, source, order, before=before)
    return BiasRows(facts, by_key=graph.call(aten.reshape.default, tokens_first, [1, -1, heads], before=before))


def _by_distance(
    graph: ModelGraph,
    bias: fx.Node,
    region: list[fx.Node],
    sources: list[fx.Node],
    mask: MaskFacts,
    before: fx.Node,
) -> fx.Node:
    """The bias as a table: its part of the graph once more, with the distances 0, 1, 2, ... in place of keys."""
    root, sign = _distance(graph, region)
    follows = [root]
    for node in region:
        if node is not root and any(parent in follows for parent in node.all_input_nodes):
            follows.append(node)
    others = {parent for node in follows[1:] for parent in node.all_input_nodes if parent in region} - set(follows)
    numbers = [number for node in follows[1:] for number in integers(node.args)]
    entries = max(numbers, default=0) + 2
    if bias not in follows or others or entries > _LONGEST_TABLE:
        raise MaskRefused("its position bias is no table by the distance to the key")
    copies = {root: _distances(graph, root, entries, sign, before)}
    for node in follows[1:]:
        copies[node] = _copy(graph, node, copies, before)
    table = copies[bias]
    for length in sorted({*LENGTHS, max(entries + 3, LENGTHS[1])}):
        given = _random(graph, sources, length)
        value, rows = _value(graph, bias, length, given), _value(graph, table, length, given)
        distance = torch.arange(length)[:, None] - torch.arange(length)
        expected = rows.gather(-1, distance.clamp(0, entries - 1).expand(rows.shape[0], -1, -1))
        seen = (distance >= 0) & expected_visibility(mask, length)
        if not torch.allclose(value[:, seen], expected[:, seen], rtol=1e-4, atol=1e-5):
            raise MaskRefused("its position bias is no table by the distance to the key")
    return graph.call(aten.transpose.int, table, 1, 2, before=before)


def _distance(graph: ModelGraph, region: list[fx.Node]) -> tuple[fx.Node, int]:
    """The first matrix of the region that holds query position minus key position, or its negative (-1)."""
    length = LENGTHS[0]
    expected = torch.arange(length)[:, None] - torch.arange(length)
    for node in region:
        if not is_evaluable(graph, node):
            continue
        value = evaluate(graph, node, length)
        if isinstance(value, Tensor) and value.numel() == length**2 and value.dtype != torch.bool:
            for sign in (1, -1):
                if torch.equal(value.reshape(length, length), sign * expected):
                    return node, sign
    raise MaskRefused("its position bias depends on the tokens, and on no distance between them")


def _distances(graph: ModelGraph, root: fx.Node, entries: int, sign: int, before: fx.Node) -> fx.Node:
    """`[.., T, entries]` in place of `[.., T, T]`: every query with the distances 0, 1, 2, ..."""
    rank, positions = root.meta["val"].dim(), graph.input("position_ids")
    steps = graph.constant("distances", sign * torch.arange(entries), before=before)
    column = graph.call(aten.reshape.default, positions, [*[1] * (rank - 2), -1, 1], before=before)
    rows = graph.call(aten.add.Tensor, graph.call(aten.mul.Tensor, column, 0, before=before), steps, before=before)
    return graph.call(aten.to.dtype, rows, root.meta["val"].dtype, before=before)


def _copy(graph: ModelGraph, node: fx.Node, copies: Mapping[fx.Node, fx.Node], before: fx.Node) -> fx.Node:
    with graph.graph.inserting_before(before):
        copy = graph.graph.node_copy(node, lambda argument: copies.get(argument, argument))
    args, kwargs = fx.map_arg((copy.args, dict(copy.kwargs)), lambda argument: argument.meta["val"])
    assert callable(copy.target)
    try:
        with graph.fake_mode:
            copy.meta["val"] = copy.target(*args, **kwargs)
        return copy
    except RuntimeError as error:
        raise MaskRefused("its position bias fixes the number of keys where its table would be read") from error
