"""KeepHiddenStates: what the head's product reads is kept for every token, so that a draft head can read it too."""

from dataclasses import dataclass

from torch import fx

from autodeploy.errors import UnsupportedModelError
from autodeploy.graph.model_graph import ModelGraph
from autodeploy.graph.transform import Transform, TransformResult
from autodeploy.ops.keep_rows import cached_keep_rows, keep_rows
from autodeploy.transforms.cache.gather_logits import find_head


@dataclass(frozen=True, kw_only=True)
class KeepHiddenStates(Transform):
    """`linear(hidden, head)`  becomes  `linear(keep_rows(hidden), head)`.

    Raises:
        UnsupportedModelError: no linear head stands before the output.
    """

    enabled: bool = False

    def apply(self, graph: ModelGraph) -> TransformResult:
        (logits,) = graph.graph.output_node().args
        assert isinstance(logits, fx.Node)
        head, _ = find_head(logits)
        if head is None:
            raise UnsupportedModelError(
                "a draft head reads the hidden states before the model's last linear layer, and no such layer was found"
                " before the logits; use another method in speculative_config"
            )
        head.update_arg(0, graph.call(keep_rows, head.args[0], before=head))
        return TransformResult(found=1, rewritten=1, expected=1)


def kept_state(graph: ModelGraph) -> str:
    """The name of the state that keeps the hidden states, once caches are inserted."""
    (node,) = graph.nodes(cached_keep_rows)
    return str(cached_keep_rows.arguments(node.args, node.kwargs)["rows"].target)
