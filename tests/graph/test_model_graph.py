"""Editing graphs: inserted nodes carry values, weights carry recipes, and clean-up drops what nobody reads."""

import torch
from torch import nn

from autodeploy.checkpoint.recipe import Slice
from autodeploy.graph.model_graph import module_path, source_line
from autodeploy.graph.text import diff_text, graph_text
from autodeploy.graph.transform import Transform, TransformResult
from autodeploy.ops import linear, rms_norm
from tests.graphs import Sketch, captured, run


def _model() -> nn.Module:
    return Sketch(lambda self, x: self.inner(x), inner=nn.Linear(16, 16))


def test_inserted_calls_have_values_and_a_source() -> None:
    graph = captured(_model())
    (node,) = [n for n in graph.graph.nodes if module_path(n) == "inner" and n.op == "call_function"]
    new = graph.call(rms_norm, node, None, 1e-6, 0.0, False, before=graph.graph.output_node(), like=node)
    assert new.meta["val"].shape == node.meta["val"].shape
    assert module_path(new) == "inner" and "graphs.py" in source_line(node)
    assert new.name.startswith("rms_norm")


def test_a_new_weight_replaces_an_old_one_which_is_dropped() -> None:
    model = _model()
    graph = captured(model)
    (node,) = [n for n in graph.nodes(torch.ops.aten.linear.default) if module_path(n) == "inner"]
    old = graph.weights["inner_weight"]
    first_half = graph.weight("inner_weight", Slice(old, 0, 0, 8), before=node)
    half = graph.call(linear, node.args[0], first_half, None, before=node)
    both = graph.call(torch.ops.aten.cat.default, [half, half], -1, before=node)
    node.replace_all_uses_with(both)
    graph.clean()
    assert set(graph.weights) == {"embed_weight", "head_weight", "inner_weight_1"}
    x = run(graph, model)
    assert x.shape == (1, 13, 32)


def test_tied_weights_are_one() -> None:
    model = Sketch()
    model.head.weight = model.embed.weight
    assert len(captured(model).weights) == 1


def test_text_and_diff_show_recipes_and_changes() -> None:
    class Relu(Transform):
        def apply(self, graph) -> TransformResult:  # type: ignore[no-untyped-def]
            output = graph.graph.output_node()
            output.args = (graph.call(torch.ops.aten.relu.default, output.args[0], before=output),)
            return TransformResult(found=1, rewritten=1)

    graph = captured(_model())
    before = graph_text(graph)
    assert "= weight inner.weight" in before and "input input_ids" in before
    assert Relu().run(graph).name == "relu"
    changes = [line for line in diff_text(before, graph_text(graph)).splitlines() if line[:1] in "+-"]
    assert any("aten.relu" in line for line in changes) and len(changes) == 5
    assert diff_text(before, before) == ""
