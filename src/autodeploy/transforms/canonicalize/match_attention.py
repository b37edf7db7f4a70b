"""MatchAttention: every softmax attention, however it is called or written, becomes one `attention` node with facts.

Three forms are known: a call of Hugging Face's attention interface (captured by hook, mask included),
`scaled_dot_product_attention`, and attention written out as product, softmax, product (`written_out.py`). Masks and
biases that the model builds itself are recognised by their values (`mask_probe.py`). What cannot be expressed is left
and refused by name.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import fx

from autodeploy.graph.model_graph import ATTENTION, ModelGraph, module_path
from autodeploy.graph.transform import Transform, TransformResult
from autodeploy.graph.verify import runs_along_tokens, token_symbol
from autodeploy.ops.attention import MaskFacts, attention
from autodeploy.ops.captured import captured_attention, captured_mask
from autodeploy.ops.sparse_attention import sparse_attention
from autodeploy.transforms.canonicalize.contraction import rearranged
from autodeploy.transforms.canonicalize.mask_probe import BiasFacts, MaskRefused
from autodeploy.transforms.canonicalize.read_selection import read_selection
from autodeploy.transforms.canonicalize.score_bias import BiasRows, read_bias
from autodeploy.transforms.canonicalize.written_out import WrittenOut, find_written_out, read_scores

aten = torch.ops.aten

_LAYOUT_OPS = {
    aten.slice.Tensor,
    aten.to.dtype,
    aten.to.device,
    aten._to_copy.default,
    aten.expand.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.dropout.default,
}
"""Ops that leave the numbers of attention scores, weights or masks as they are in a whole, unpadded row."""


@dataclass(frozen=True)
class _Site:
    """One call found in the graph, heads before tokens: query `[..., N, T, H]`, key and value `[..., K, T, ...]`."""

    node: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    mask: fx.Node | None
    causal: bool
    scale: float
    softcap: float | None = None
    sinks: fx.Node | None = None
    sliding_window: int | None = None
    bias: fx.Node | None = None
    indices: fx.Node | None = None
    block_size: int = 1
    tokens_first: bool = False
    """the node's own result is `[1, T, N, V]` rather than `[..., N, T, V]`"""


@dataclass(frozen=True, kw_only=True)
class MatchAttention(Transform):
    """`captured_attention`, `scaled_dot_product_attention`, `softmax(q @ k.T * s + mask) @ v`  become  `attention`."""

    def apply(self, graph: ModelGraph) -> TransformResult:
        symbol = token_symbol(graph)
        fused = [n for n in graph.nodes(aten.scaled_dot_product_attention.default) if runs_along_tokens(n, symbol)]
        calls = [
            *(_captured_site(node) for node in graph.nodes(captured_attention)),
            *(_fused_site(node) for node in fused),
        ]
        written_out = find_written_out(graph)
        rewrites = [
            *((site.node, partial(_rewrite_call, graph, site)) for site in calls),
            *((site.output.node, partial(_rewrite_written_out, graph, site)) for site in written_out),
        ]
        refused = []
        for node, rewrite in rewrites:
            try:
                rewrite()
            except MaskRefused as reason:
                refused.append(f"attention in {module_path(node) or '(top)'}: {reason}")
        found = len(calls) + len(written_out)
        return TransformResult(
            found=found,
            rewritten=found - len(refused),
            expected=max(found, graph.writes(ATTENTION)),
            refused=tuple(refused),
        )


def _rewrite_call(graph: ModelGraph, site: _Site) -> None:
    """A call of attention with separate arguments."""
    bias = _facts(graph, site)
    rows = [_four_dims(graph, _without_repeat(node), site.node) for node in (site.query, site.key, site.value)]
    if site.indices is not None:
        site.node.replace_all_uses_with(_sparse_attention(graph, rows, bias, site))
        return
    if bias.by_key is not None:
        rows[:2] = _with_key_bias(graph, rows[0], rows[1], bias.by_key, site)
    output = _attention(graph, rows, bias, site.scale, site.softcap, site.sinks, site.node)
    if not site.tokens_first:
        output = graph.call(aten.transpose.int, output, 1, 2, before=site.node)
        output = _reshaped(graph, output, site.node.meta["val"].shape, site.node)
    site.node.replace_all_uses_with(output)


def _rewrite_written_out(graph: ModelGraph, site: WrittenOut) -> None:
    """Two products and a softmax; the letters say which dimension of each operand is what."""
    facts = read_scores(graph, site)
    before, scores, output = site.output.node, site.scores, site.output
    weights, _, out = output.letters
    heads, (width,) = weights[:-2], [letter for letter in out if letter not in weights]
    head_sizes = [scores.node.meta["val"].shape[scores.letters[2].index(letter)] for letter in site.heads]
    query = rearranged(graph, scores.left, scores.letters[0], site.heads + site.query + site.dim, before)
    key = rearranged(graph, scores.right, scores.letters[1], site.heads + site.key + site.dim, before)
    value = rearranged(graph, output.right, output.letters[1], heads + weights[-1] + width, before)
    rows = [_four_dims(graph, _grouped(graph, node, head_sizes, before), before) for node in (query, key, value)]
    result = _attention(graph, rows, BiasRows(facts.bias), facts.scale, facts.softcap, None, before)
    result = graph.call(aten.transpose.int, result, 1, 2, before=before)
    shape = [output.node.meta["val"].shape[out.index(letter)] for letter in heads + weights[-2] + width]
    result = _reshaped(graph, result, shape, before)
    before.replace_all_uses_with(rearranged(graph, result, heads + weights[-2] + width, out, before))


def _attention(
    graph: ModelGraph,
    rows: list[fx.Node],
    bias: BiasRows,
    scale: float,
    softcap: float | None,
    sinks: fx.Node | None,
    node: fx.Node,
) -> fx.Node:
    """The canonical op in place of `node`, from query, key and value `[1, heads, T, ...]`."""
    mask, slopes = bias.facts.mask, bias.facts.slopes
    slopes_node = None if slopes is None else graph.constant("slopes", slopes, before=node)
    query, key, value = (graph.call(aten.transpose.int, row, 1, 2, before=node) for row in rows)
    facts = (scale, mask.causal, mask.sliding_window, mask.chunk_size, softcap, slopes_node, bias.by_distance)
    boundaries = graph.input("cu_seqlens")
    return graph.call(attention, query, key, value, boundaries, sinks, *facts, before=node, like=node)


def _sparse_attention(graph: ModelGraph, rows: list[fx.Node], bias: BiasRows, site: _Site) -> fx.Node:
    """Attention to the tokens an indexer chooses; the indexer becomes part of the op."""
    if bias != BiasRows(BiasFacts(MaskFacts(causal=True))) or site.softcap is not None or site.indices is None:
        raise MaskRefused(
            "it attends to chosen tokens under a mask that is more than causal, or with a bias or soft cap"
        )
    selection = read_selection(graph, site.indices, site.block_size, site.node)
    query, key, value = (graph.call(aten.transpose.int, row, 1, 2, before=site.node) for row in rows)
    indexer = (selection.index_query, selection.index_key, selection.index_weights)
    facts = (site.sinks, site.scale, selection.top_k, site.block_size, selection.local_blocks)
    boundaries = graph.input("cu_seqlens")
    return graph.call(
        sparse_attention, query, key, value, *indexer, boundaries, *facts, before=site.node, like=site.node
    )


def _with_key_bias(
    graph: ModelGraph, query: fx.Node, key: fx.Node, by_key: fx.Node, site: _Site
) -> tuple[fx.Node, fx.Node]:
    """`q · k * scale + b`  as  `[q, 1 / scale] · [k, b] * scale`: the bias is remembered with its key."""
    if site.softcap is not None or by_key.meta["val"].shape[2] != key.meta["val"].shape[1]:
        raise MaskRefused("it adds a bias by key that its keys have no room for")
    column = graph.call(aten.slice.Tensor, query, 3, 0, 1, before=site.node)
    column = graph.call(aten.full_like.default, column, 1.0 / site.scale, before=site.node)
    bias = graph.call(aten.transpose.int, by_key, 1, 2, before=site.node)
    bias = graph.call(aten.unsqueeze.default, bias, 3, before=site.node)
    bias = graph.call(aten.to.dtype, bias, key.meta["val"].dtype, before=site.node)
    return (
        graph.call(aten.cat.default, [query, column], 3, before=site.node),
        graph.call(aten.cat.default, [key, bias], 3, before=site.node),
    )


def _four_dims(graph: ModelGraph, node: fx.Node, before: fx.Node) -> fx.Node:
    """`[..., T, H]` as `[1, heads, T, H]`."""
    *leading, tokens, width = node.meta["val"].shape
    if not all(isinstance(size, int) for size in [*leading, width]):
        raise MaskRefused(f"its operand is {list(node.meta['val'].shape)}, expected [1, heads, T, dim]")
    return _reshaped(graph, node, [1, math.prod(leading), tokens, width], before)


def _reshaped(graph: ModelGraph, node: fx.Node, shape: Any, before: fx.Node) -> fx.Node:
    """A node in another shape with the same tokens; seen through a reshape that had just undone it."""
    wanted = [str(size) for size in shape]
    for source in (node, node.args[0] if node.target == aten.reshape.default else node):
        if isinstance(source, fx.Node) and [str(size) for size in source.meta["val"].shape] == wanted:
            return source
    sizes = [size if isinstance(size, int) else -1 for size in shape]
    return graph.call(aten.reshape.default, node, sizes, before=before)


def _grouped(graph: ModelGraph, node: fx.Node, head_sizes: list[Any], before: fx.Node) -> fx.Node:
    """Rows `[*heads, T, dim]` that are shared by the last of the head dimensions only, or not at all."""
    shared = [mine == 1 and full != 1 for mine, full in zip(node.meta["val"].shape, head_sizes, strict=False)]
    if shared == sorted(shared):
        return node
    return graph.call(aten.expand.default, node, [*head_sizes, -1, -1], before=before)


def _facts(graph: ModelGraph, site: _Site) -> BiasRows:
    """A mask, where there is one, says all there is; without one the call's own flags do. A bias comes on top."""
    if site.mask is None:
        rows = BiasRows(BiasFacts(MaskFacts(causal=site.causal, sliding_window=site.sliding_window)))
    else:
        rows = _read_mask(graph, site.mask, site.node)
        if site.causal and not site.tokens_first:
            rows = replace(rows, facts=replace(rows.facts, mask=replace(rows.facts.mask, causal=True)))
    if site.bias is None:
        return rows
    bias = read_bias(graph, site.bias, site.node)
    if bias.facts.mask != MaskFacts() or (rows.facts.slopes is not None and bias.facts.slopes is not None):
        raise MaskRefused("its position bias hides keys, or is one of two")
    slopes = bias.facts.slopes if rows.facts.slopes is None else rows.facts.slopes
    return BiasRows(replace(rows.facts, slopes=slopes), rows.by_key or bias.by_key, bias.by_distance)


def _read_mask(graph: ModelGraph, node: fx.Node, before: fx.Node) -> BiasRows:
    mask = _through_layout(node)
    if mask.target == captured_mask.overload:
        causal, sliding_window, chunk_size = mask.args[2:5]
        return BiasRows(BiasFacts(MaskFacts(bool(causal), sliding_window, chunk_size)))  # type: ignore[arg-type]
    return read_bias(graph, node, before)


def _captured_site(node: fx.Node) -> _Site:
    call: dict[str, Any] = captured_attention.arguments(node.args, node.kwargs)
    del call["cu_seqlens"]
    return _Site(node, tokens_first=True, **call)


def _fused_site(node: fx.Node) -> _Site:
    named = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
    given: dict[str, Any] = dict(zip(named, node.args, strict=False)) | dict(node.kwargs)
    query = given["query"]
    scale = given.get("scale")
    scale = float(query.meta["val"].shape[-1]) ** -0.5 if scale is None else scale
    causal = bool(given.get("is_causal", False))
    return _Site(node, query, given["key"], given["value"], given.get("attn_mask"), causal, scale)


def _through_layout(node: fx.Node) -> fx.Node:
    while node.target in _LAYOUT_OPS and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _without_repeat(node: fx.Node) -> fx.Node:
    """Key or value before its heads were repeated to the number of query heads; the node itself when they were not."""
    if node.target == aten.repeat_interleave.self_int and len(node.args) > 2 and node.args[2] == 1:
        inner = node.args[0]
        return inner if isinstance(inner, fx.Node) else node
    if node.target not in (aten.reshape.default, aten.view.default, aten._unsafe_view.default):
        return node
    expand = node.args[0]
    if isinstance(expand, fx.Node) and expand.target in (aten.clone.default, aten.contiguous.default):
        expand = expand.args[0]
    if not isinstance(expand, fx.Node) or expand.target != aten.expand.default:
        return node
    unsqueeze = expand.args[0]
    while isinstance(unsqueeze, fx.Node) and unsqueeze.target == aten.slice.Tensor:
        unsqueeze = unsqueeze.args[0]
    if not isinstance(unsqueeze, fx.Node) or unsqueeze.target != aten.unsqueeze.default or unsqueeze.args[1] != 2:
        return node
    inner = unsqueeze.args[0]
    return inner if isinstance(inner, fx.Node) and inner.meta["val"].dim() == 4 else node
