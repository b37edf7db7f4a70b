"""MatchDenseExperts: experts that a model runs on all tokens, most with zeros, run on the tokens that chose them."""

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from autodeploy.graph.model_graph import ModelGraph, module_path
from autodeploy.graph.transform import Transform, TransformResult
from autodeploy.ops.moe import moe
from autodeploy.transforms.fuse.fuse_gate_up import gated, halves

aten = torch.ops.aten

_LAYOUT = (
    aten.reshape.default, aten.view.default, aten._unsafe_view.default, aten.clone.default, aten.contiguous.default,
)  # fmt: skip
_POINTWISE = (
    aten.sigmoid.default, aten.relu.default, aten.exp.default, aten.tanh.default, aten.to.dtype, aten._to_copy.default,
)  # fmt: skip


@dataclass(frozen=True)
class _Site:
    """`Σₑ down[e] · (act(gate) · up)(x · scores[:, e])`, and where the scores come from."""

    x: fx.Node
    scores: fx.Node
    indices: fx.Node
    gate_up: fx.Node
    down: fx.Node
    activation: str


@dataclass(frozen=True, kw_only=True)
class MatchDenseExperts(Transform):
    """`sum(bmm(act(gate) · up, down))` over all experts, of `bmm(x.repeat(E, 1) * scores.T, gate_up)`  becomes  `moe`.

    Holds where the scores of experts that were not chosen are zero: what they multiply adds nothing then, as such
    experts have no biases. That is checked by running the code between the choice and the scores on the value that it
    starts from.
    """

    def apply(self, graph: ModelGraph) -> TransformResult:
        found, refused = 0, []
        for total in graph.nodes(aten.sum.dim_IntList):
            products = _products(graph, total)
            if products is None:
                continue
            found += 1
            site = _site(graph, *products)
            if site is None:
                refused.append(
                    f"experts in {module_path(total) or '(top)'}: not every unchosen expert is known to be zero"
                )
            else:
                total.replace_all_uses_with(_mixture(graph, site, total))
        return TransformResult(found=found, rewritten=found - len(refused), expected=found, refused=tuple(refused))


def _products(graph: ModelGraph, total: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two products per expert whose results are summed over all experts, or None."""
    down = _source(total.args[0])
    if down is None or not _is_stack_product(graph, down) or total.args[1:] != ([0],) or not _is_gated(down.args[0]):
        return None
    if total.args[0].meta["val"].shape[0] != down.meta["val"].shape[0]:  # type: ignore[union-attr]
        return None
    found = gated(down.args[0])  # type: ignore[arg-type]
    up = halves(found[1], found[2]) if found is not None else None
    return (up, down) if up is not None and _is_stack_product(graph, up) else None


def _is_gated(node: object) -> bool:
    return isinstance(node, fx.Node) and node.target == aten.mul.Tensor


def _is_stack_product(graph: ModelGraph, node: fx.Node) -> bool:
    recipe = graph.recipe(node.args[1]) if node.target == aten.bmm.default else None
    return recipe is not None and len(recipe.shape) == 3


def _site(graph: ModelGraph, up: fx.Node, down: fx.Node) -> _Site | None:
    scaled = _source(up.args[0])
    if scaled is None or scaled.target != aten.mul.Tensor:
        return None
    num_experts = int(down.meta["val"].shape[0])
    for repeated, factors in (scaled.args[:2], scaled.args[1::-1]):
        column = _source(factors)
        is_repeated = isinstance(repeated, fx.Node) and repeated.target == aten.repeat.default
        if not is_repeated or repeated.args[1] != [num_experts, 1] or column is None:  # type: ignore[union-attr]
            continue
        x, scores = repeated.args[0], column.args[0]  # type: ignore[union-attr]
        turned = column.target in (aten.transpose.int, aten.t.default) and len(column.meta["val"].shape) == 2
        indices = _chosen(scores) if turned else None
        found = gated(down.args[0])  # type: ignore[arg-type]
        if indices is not None and found is not None and isinstance(x, fx.Node) and isinstance(scores, fx.Node):
            gate_up, weight = up.args[1], down.args[1]
            assert isinstance(gate_up, fx.Node) and isinstance(weight, fx.Node)
            return _Site(x, scores, indices, gate_up, weight, found[0])
    return None


def _chosen(scores: object) -> fx.Node | None:
    """The choices that scores are zero beside, or None where that is not certain."""
    functions: list[fx.Node] = []
    node = scores
    while isinstance(node, fx.Node) and node.target in _POINTWISE:
        functions.append(node)
        node = node.args[0]
    if not isinstance(node, fx.Node) or node.target != aten.scatter.src or node.args[1] not in (1, -1):
        return None
    full, indices = node.args[0], node.args[2]
    if not isinstance(full, fx.Node) or full.target not in (aten.full_like.default, aten.full.default):
        return None
    value: Tensor = torch.full((1,), full.args[1], dtype=full.meta["val"].dtype)  # type: ignore[arg-type]
    for function in reversed(functions):
        value = function.target(value, *function.args[1:], **function.kwargs)  # type: ignore[operator]
    return indices if isinstance(indices, fx.Node) and not bool(value.any()) else None


def _mixture(graph: ModelGraph, site: _Site, before: fx.Node) -> fx.Node:
    """Each choice is a row of its own, scaled as the model scales it, and weighs 1."""

    def call(target: object, *args: object) -> fx.Node:
        return graph.call(target, *args, before=before)  # type: ignore[arg-type]

    num_choices, hidden = int(site.indices.meta["val"].shape[1]), int(site.x.meta["val"].shape[1])
    chosen = call(aten.gather.default, site.scores, 1, site.indices)
    rows = call(aten.mul.Tensor, call(aten.unsqueeze.default, site.x, 1), call(aten.unsqueeze.default, chosen, 2))
    rows = call(aten.reshape.default, rows, [-1, hidden])
    indices = call(aten.reshape.default, site.indices, [-1, 1])
    ones = call(aten.ones_like.default, call(aten.reshape.default, chosen, [-1, 1]))
    weights = [call(aten.transpose.int, weight, 1, 2) for weight in (site.gate_up, site.down)]
    result = call(moe, rows, indices, ones, *weights, None, None, site.activation, True, None, 0.0)
    return call(aten.sum.dim_IntList, call(aten.reshape.default, result, [-1, num_choices, hidden]), [1])


def _source(node: object) -> fx.Node | None:
    """The node behind changes of layout."""
    while isinstance(node, fx.Node) and node.target in _LAYOUT:
        node = node.args[0]
    return node if isinstance(node, fx.Node) else None
