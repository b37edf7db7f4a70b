"""FuseRopeAttention: rope and the attention that reads it become one op, where their provider has a kernel of it."""

import operator
from dataclasses import dataclass

from torch import fx

from autodeploy.graph.model_graph import ModelGraph, module_path
from autodeploy.graph.transform import Transform, TransformResult
from autodeploy.ops.attention import cached_attention
from autodeploy.ops.rope import rope
from autodeploy.ops.rope_attention import cached_rope_attention


@dataclass(frozen=True, kw_only=True)
class FuseRopeAttention(Transform):
    """`q, k = rope(q, k, ...); cached_attention(q, k, ...)`  becomes  `cached_rope_attention(q, k, ...)`.

    So turned keys go straight into their pages. A site is a key that comes from `rope` as it is, where one provider was
    chosen for both ops and has a kernel of the one; graphs for other providers have none and stay as they are.
    """

    def apply(self, graph: ModelGraph) -> TransformResult:
        found, refused = 0, []
        for attention in graph.nodes(cached_attention):
            turning = _turning(attention)
            if turning is None:
                continue
            found += 1
            reason = _why_kept(attention, turning) or _fuse(graph, attention, turning)
            if reason is not None:
                refused.append(f"attention in {module_path(attention) or '(top)'}: {reason}")
        return TransformResult(found=found, rewritten=found - len(refused), expected=found, refused=tuple(refused))


def _turning(attention: fx.Node) -> fx.Node | None:
    """The `rope` that gives an attention's keys, if the provider of both offers to do both at once."""
    key = attention.args[1]
    if not isinstance(key, fx.Node) or key.target is not operator.getitem or key.args[1] != 1:
        return None
    turning, provider = key.args[0], attention.meta.get("provider")
    assert isinstance(turning, fx.Node)
    is_site = turning.target == rope.overload and turning.meta.get("provider") == provider
    return turning if is_site and provider in cached_rope_attention.kernels else None


def _why_kept(attention: fx.Node, turning: fx.Node) -> str | None:
    """The reason that turned queries or keys must be there for somebody else, or None."""
    query, key = attention.args[:2]
    assert isinstance(query, fx.Node) and isinstance(key, fx.Node)
    if query.target is not operator.getitem or query.args != (turning, 0):
        return "its queries were not turned together with its keys"
    if set(turning.users) != {query, key} or any(set(turned.users) != {attention} for turned in (query, key)):
        return "something else reads what was turned for it"
    if attention.args.count(query) + attention.args.count(key) > 2:
        return "it reads what was turned in another place too"
    return None


def _fuse(graph: ModelGraph, attention: fx.Node, turning: fx.Node) -> str | None:
    """Put one call in the place of both, or give the reason that there is no kernel for it."""
    given = cached_attention.arguments(attention.args, attention.kwargs) | rope.arguments(turning.args, turning.kwargs)
    provider = attention.meta["provider"]
    values = fx.map_arg(given, lambda argument: argument.meta["val"])
    reason = cached_rope_attention.kernels[provider].supports(**values)
    if reason is not None:
        return f"{provider}: {reason}"
    arguments = [given[name] for name in cached_rope_attention.parameters]
    fused = graph.call(cached_rope_attention, *arguments, before=attention, like=attention)
    fused.meta["provider"] = provider
    attention.replace_all_uses_with(fused)
    graph.graph.erase_node(attention)
    return None
