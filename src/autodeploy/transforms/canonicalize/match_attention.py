"""MatchAttention: every softmax attention, however it is called or written, becomes one `attention` node with facts.

Three forms are known: a call of Hugging Face's attention interface (captured by hook, mask included),
`scaled_dot_product_attention`, and attention written out as matmul, softmax, matmul. Masks that the model builds itself
are recognised by their values (`mask_probe.py`). What cannot be expressed is left and refused by name.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from autodeploy.graph.model_graph import ATTENTION, ModelGraph, module_path
from autodeploy.graph.transform import Transform, TransformResult
from autodeploy.ops.attention import MaskFacts, attention
from autodeploy.ops.captured import captured_attention, captured_mask
from autodeploy.transforms.canonicalize.mask_probe import MaskRefused, probe_mask

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
    """One attention found in the graph, heads before tokens: query `[1, N, T, H]`, key and value `[1, K, T, ...]`."""

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
    tokens_first: bool = False
    """the node's own result is `[1, T, N, V]` rather than `[1, N, T, V]`"""


@dataclass(frozen=True, kw_only=True)
class MatchAttention(Transform):
    """`captured_attention`, `scaled_dot_product_attention`, `softmax(q @ k.T * s + mask) @ v`  become  `attention`."""

    def apply(self, graph: ModelGraph) -> TransformResult:
        sites = [
            *(_captured_site(node) for node in graph.nodes(captured_attention)),
            *(_fused_site(node) for node in graph.nodes(aten.scaled_dot_product_attention.default)),
            *(site for node in _softmax_nodes(graph) if (site := _written_out_site(node)) is not None),
        ]
        refused = []
        for site in sites:
            try:
                self._rewrite(graph, site)
            except MaskRefused as reason:
                refused.append(f"attention in {module_path(site.node) or '(top)'}: {reason}")
        return TransformResult(
            found=len(sites),
            rewritten=len(sites) - len(refused),
            expected=max(len(sites), graph.writes(ATTENTION)),
            refused=tuple(refused),
        )

    def _rewrite(self, graph: ModelGraph, site: _Site) -> None:
        cu_seqlens = graph.input("cu_seqlens")
        if site.query.meta["val"].dim() != 4:
            raise MaskRefused(f"its query has {site.query.meta['val'].dim()} dimensions, expected [1, heads, T, dim]")
        facts = _facts(graph, site)
        query, key, value = (
            graph.call(aten.transpose.int, _without_repeat(node), 1, 2, before=site.node)
            for node in (site.query, site.key, site.value)
        )
        output = graph.call(
            attention,
            query,
            key,
            value,
            cu_seqlens,
            site.sinks,
            site.scale,
            facts.causal,
            facts.sliding_window,
            facts.chunk_size,
            site.softcap,
            before=site.node,
            like=site.node,
        )
        if not site.tokens_first:
            output = graph.call(aten.transpose.int, output, 1, 2, before=site.node)
        site.node.replace_all_uses_with(output)


def _facts(graph: ModelGraph, site: _Site) -> MaskFacts:
    """A mask, where there is one, says all there is; without one the call's own flags do."""
    if site.mask is None:
        return MaskFacts(causal=site.causal, sliding_window=site.sliding_window)
    mask = _through_layout(site.mask)
    if mask.target == captured_mask.overload:
        causal, sliding_window, chunk_size = mask.args[2:5]
        facts = MaskFacts(bool(causal), sliding_window, chunk_size)  # type: ignore[arg-type]
    else:
        facts = probe_mask(graph, site.mask)
    return replace(facts, causal=True) if site.causal and not site.tokens_first else facts


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


def _softmax_nodes(graph: ModelGraph) -> list[fx.Node]:
    return graph.nodes(aten.softmax.int) + graph.nodes(aten._softmax.default)


def _written_out_site(softmax: fx.Node) -> _Site | None:
    """`softmax(scores) @ value` where scores are a product of two activations, scaled, capped and masked; else None."""
    product = _only_user(softmax)
    if product is None or product.target != aten.matmul.default or not isinstance(product.args[1], fx.Node):
        return None
    mask: fx.Node | None = None
    softcap: float | None = None
    scores: object = softmax.args[0]
    scale = 1.0
    while isinstance(scores, fx.Node):
        scores = _through_layout(scores)
        if scores.target == aten.matmul.default:
            break
        step = _unwrap_score(scores)
        if step is None or (mask is not None and step.mask is not None):
            return None
        mask = step.mask if step.mask is not None else mask
        scale, softcap = scale * step.scale, step.softcap or softcap
        scores = step.inner
    if not isinstance(scores, fx.Node) or scores.target != aten.matmul.default:
        return None
    query, transposed_key = scores.args
    key = _untransposed(transposed_key)
    if not isinstance(query, fx.Node) or key is None:
        return None
    query, factor = _unscaled(query)
    key, key_factor = _unscaled(key)
    return _Site(product, query, key, product.args[1], mask, False, scale * factor * key_factor, softcap)


@dataclass(frozen=True)
class _ScoreStep:
    """One operation between the score product and the softmax, undone."""

    inner: object
    mask: fx.Node | None = None
    scale: float = 1.0
    softcap: float | None = None


def _unwrap_score(node: fx.Node) -> _ScoreStep | None:
    args = node.args
    if node.target in (aten.mul.Tensor, aten.div.Tensor):
        inner, factor = _scaled_by(node)
        return None if factor is None else _unwrap_softcap(inner, factor) or _ScoreStep(inner, scale=factor)
    if node.target == aten.add.Tensor and isinstance(args[1], fx.Node):
        return _ScoreStep(args[0], mask=args[1])
    if node.target == aten.masked_fill.Scalar and isinstance(args[2], float | int) and args[2] <= -1e4:
        return _ScoreStep(args[0], mask=_Inverted.of(args[1]))
    return None


def _unwrap_softcap(inner: object, factor: float) -> _ScoreStep | None:
    """`tanh(x / cap) * cap`."""
    if not isinstance(inner, fx.Node) or inner.target != aten.tanh.default or not isinstance(inner.args[0], fx.Node):
        return None
    source, inverse = _scaled_by(inner.args[0])
    if inverse is None or abs(inverse * factor - 1.0) > 1e-6:
        return None
    return _ScoreStep(source, softcap=factor)


class _Inverted:
    """`masked_fill` hides where its mask is True; visibility masks are the other way round."""

    @staticmethod
    def of(node: object) -> fx.Node | None:
        if not isinstance(node, fx.Node):
            return None
        if node.target in (aten.logical_not.default, aten.bitwise_not.default):
            inner = node.args[0]
            return inner if isinstance(inner, fx.Node) else None
        with node.graph.inserting_after(node):
            inverted = node.graph.call_function(aten.logical_not.default, (node,))
        inverted.meta = dict(node.meta)
        return inverted


def _scaled_by(node: fx.Node) -> tuple[object, float | None]:
    """`x * c` or `x / c` with a number c: the input and the factor; the factor is None for anything else."""
    number = node.args[1] if len(node.args) > 1 else None
    if not isinstance(number, float | int) or isinstance(number, bool):
        return node, None
    if node.target == aten.mul.Tensor:
        return node.args[0], float(number)
    if node.target == aten.div.Tensor and number != 0:
        return node.args[0], 1.0 / number
    return node, None


def _unscaled(node: fx.Node) -> tuple[fx.Node, float]:
    inner, factor = _scaled_by(node)
    return (inner, factor) if factor is not None and isinstance(inner, fx.Node) else (node, 1.0)


def _untransposed(node: object) -> fx.Node | None:
    """x of a node that computes x with its last two dimensions exchanged."""
    if not isinstance(node, fx.Node):
        return None
    inner, rank = node.args[0], node.meta["val"].dim()
    swaps = node.target == aten.transpose.int and {dim % rank for dim in node.args[1:]} == {rank - 1, rank - 2}
    if node.target == aten.permute.default:
        order = [dim % rank for dim in node.args[1]]  # type: ignore[union-attr]
        swaps = order == [*range(rank - 2), rank - 1, rank - 2]
    return inner if swaps and isinstance(inner, fx.Node) else None


def _through_layout(node: fx.Node) -> fx.Node:
    while node.target in _LAYOUT_OPS and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def _only_user(node: fx.Node) -> fx.Node | None:
    """The single node that consumes a value, seen through casts, copies and dropout."""
    while len(node.users) == 1:
        node = next(iter(node.users))
        if node.target not in _LAYOUT_OPS:
            return node
    return None


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
