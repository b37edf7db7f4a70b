"""GatherLogits: the head's product runs for the rows whose logits are wanted, not for the whole packed row."""

from dataclasses import dataclass

import torch
from torch import fx

from autodeploy.graph.model_graph import ModelGraph
from autodeploy.graph.transform import Transform, TransformResult
from autodeploy.ops.linear import linear
from autodeploy.transforms.cache.insert_cached_ops import batch_input

aten = torch.ops.aten

_TOKEN_WISE = {
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.add.Tensor,
    aten.tanh.default,
    aten.to.dtype,
    aten._to_copy.default,
    aten.slice.Tensor,
    aten.contiguous.default,
    aten.clamp.default,
}
"""ops that treat every row by itself, so that rows may be picked before them"""


@dataclass(frozen=True, kw_only=True)
class GatherLogits(Transform):
    """`linear(hidden, head)`  becomes  `linear(hidden[:, logits_indices], head)`; the graph's result becomes `[R, V]`.

    When something stands between head and output that is not token-wise, the rows are picked at the output instead.
    """

    def apply(self, graph: ModelGraph) -> TransformResult:
        output = graph.graph.output_node()
        (logits,) = output.args
        assert isinstance(logits, fx.Node)
        indices = batch_input(graph, "logits_indices")
        head, chain = find_head(logits)
        refused: tuple[str, ...] = ()
        if head is None:
            picked = graph.call(aten.index_select.default, logits, 1, indices, before=output)
            refused = ("no linear head was found before the output; all rows are computed and then picked",)
        else:
            hidden = graph.call(aten.index_select.default, head.args[0], 1, indices, before=head)
            head.update_arg(0, hidden)
            for node in [head, *reversed(chain)]:
                _refresh(graph, node)
            picked = logits
        rows = graph.call(aten.squeeze.dim, picked, 0, before=output)
        output.args = (rows,)
        return TransformResult(found=1, rewritten=0 if head is None else 1, expected=1, refused=refused)


def find_head(logits: fx.Node) -> tuple[fx.Node | None, list[fx.Node]]:
    """The last linear before the output and the token-wise nodes after it, nearest the output first."""
    chain: list[fx.Node] = []
    node = logits
    while node.target != linear.overload:
        inputs = [parent for parent in node.all_input_nodes if parent.op != "get_attr"]
        if node.target not in _TOKEN_WISE or len(inputs) != 1 or len(node.users) != 1 or _slices_tokens(node):
            return None, []
        chain.append(node)
        node = inputs[0]
    return (node, chain) if len(node.users) == 1 else (None, [])


def _slices_tokens(node: fx.Node) -> bool:
    return node.target == aten.slice.Tensor and bool(node.args[1] == 1)


def _refresh(graph: ModelGraph, node: fx.Node) -> None:
    """Recompute a node's fake value after its input changed shape."""
    args = fx.map_arg(node.args, lambda argument: argument.meta["val"])
    kwargs = fx.map_arg(node.kwargs, lambda argument: argument.meta["val"])
    assert callable(node.target)
    with graph.fake_mode:
        node.meta["val"] = node.target(*args, **kwargs)
