"""MatchMLA: attention whose keys and values are made from one latent per token keeps the latent instead of them."""

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from autodeploy.graph.model_graph import ModelGraph, module_path
from autodeploy.graph.transform import Transform, TransformResult
from autodeploy.ops.attention import attention
from autodeploy.ops.linear import linear
from autodeploy.ops.mla import mla
from autodeploy.transforms.canonicalize.evaluate import NotEvaluable, evaluate, shape_at

aten = torch.ops.aten

_LENGTH = 7
"""tokens of the row on which the making of keys and values is run"""


@dataclass(frozen=True)
class _Latents:
    """What keys and values are made of: a product with a latent, and a key that all heads share."""

    product: fx.Node
    shared_key: fx.Node


@dataclass(frozen=True, kw_only=True)
class MatchMLA(Transform):
    """`attention(q, [(up @ c)[:p], k], (up @ c)[p:])`  becomes  `mla(q, c, k, up)`.

    Keys and values of all heads are rows of one product with a latent, and of a shared key; that is shown by running
    what lies between. Cached are the latent and the shared key. Numbers change within the op's tolerance: with a cache,
    attention runs on the latents.
    """

    def apply(self, graph: ModelGraph) -> TransformResult:
        found, refused = 0, []
        for node in graph.nodes(attention):
            arguments = attention.arguments(node.args, node.kwargs)
            latents = _latents(arguments["key"], arguments["value"])
            if latents is None or not _is_made_of(graph, arguments, latents):
                continue
            found += 1
            facts = ("sinks", "sliding_window", "chunk_size", "softcap", "slopes", "distance_logits")
            given = [name for name in facts if arguments[name] is not None]
            if given or not arguments["causal"] or latents.product.args[2] is not None:
                refused.append(f"attention in {module_path(node)}: {', '.join(given) or 'a bias, or no causal mask'}")
                continue
            node.replace_all_uses_with(_latent_attention(graph, node, latents))
        return TransformResult(found=found, rewritten=found - len(refused), expected=found, refused=tuple(refused))


def _latents(key: fx.Node, value: fx.Node) -> _Latents | None:
    """The product behind the value, and the only other thing behind the key; None when they are otherwise made."""
    width = key.meta["val"].shape[-1]
    product = value
    while product.target != linear.overload:
        parents = _not_sizes(product)
        if len(parents) != 1 or product.op != "call_function":
            return None
        product = parents[0]
    sources: list[fx.Node] = []
    seen, pending = {key}, [key]
    while pending:
        for parent in _not_sizes(pending.pop()):
            value_of_parent = parent.meta.get("val")
            if parent in seen or parent is product:
                continue
            seen.add(parent)
            if parent.target == linear.overload or parent.op != "call_function":
                return None
            if isinstance(value_of_parent, Tensor) and _per_token(value_of_parent) < width:
                sources.append(parent)
            else:
                pending.append(parent)
    return _Latents(product, sources[0]) if len(sources) == 1 else None


def _not_sizes(node: fx.Node) -> list[fx.Node]:
    return [parent for parent in node.all_input_nodes if not isinstance(parent.meta.get("val"), torch.SymInt)]


def _per_token(value: Tensor) -> int:
    sizes = [size for size in value.shape if isinstance(size, int)]
    return int(torch.Size(sizes).numel())


def _is_made_of(graph: ModelGraph, arguments: dict[str, fx.Node], latents: _Latents) -> bool:
    """Keys are rows of the product and then the shared key, values are the rows after the keys'."""
    generator = torch.Generator().manual_seed(0)
    given = {
        node: torch.randn(shape_at(graph, node.meta["val"], _LENGTH), generator=generator)
        for node in (latents.product, latents.shared_key)
    }
    try:
        key, value = (evaluate(graph, arguments[name], _LENGTH, given) for name in ("key", "value"))
    except NotEvaluable:
        return False
    heads, width = key.shape[2:]
    shared = given[latents.shared_key].reshape(1, _LENGTH, 1, -1).expand(-1, -1, heads, -1)
    own = width - shared.shape[-1]
    if own < 1 or heads * (own + value.shape[3]) != given[latents.product].shape[-1]:
        return False
    rows = given[latents.product].reshape(1, _LENGTH, heads, own + value.shape[3])
    return torch.equal(key, torch.cat((rows[..., :own], shared), -1)) and torch.equal(value, rows[..., own:])


def _latent_attention(graph: ModelGraph, node: fx.Node, latents: _Latents) -> fx.Node:
    arguments = attention.arguments(node.args, node.kwargs)
    latent, shared = (
        graph.call(aten.reshape.default, part, [1, -1, part.meta["val"].shape[-1]], before=node)  # type: ignore[union-attr]
        for part in (latents.product.args[0], latents.shared_key)
    )
    up = latents.product.args[1]
    query, boundaries, scale = arguments["query"], arguments["cu_seqlens"], arguments["scale"]
    return graph.call(mla, query, latent, shared, up, boundaries, scale, before=node, like=node)
