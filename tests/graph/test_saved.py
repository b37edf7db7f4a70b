"""Saved graphs: what comes back computes what was saved, and what a file cannot hold is refused."""

import operator
from pathlib import Path

import pytest
import torch

from autodeploy.build import transform
from autodeploy.capture.export import capture
from autodeploy.config import CompileOptions
from autodeploy.graph.model_graph import BRANCH, ModelGraph
from autodeploy.graph.saved import NotSavable, describe, restore, save
from autodeploy.graph.text import graph_text
from tests import tiny
from tests.graphs import Sketch, captured


def _lowered(name: str, quantization: str | None) -> ModelGraph:
    graph = capture((tiny.TINY | tiny.HYBRID)[name]())
    transform(graph, CompileOptions(quantization=quantization), torch.device("cpu"))
    return graph


@pytest.mark.parametrize(
    ("name", "quantization"),
    [
        *(("llama", None), ("gemma3_text", None), ("gpt2", None), ("bamba", None)),
        *(("cohere2", "int8"), ("llama", "fp8"), ("llama", "nvfp4")),
    ],
)
def test_comes_back_as_it_was(name: str, quantization: str | None, tmp_path: Path) -> None:
    graph = _lowered(name, quantization)
    next(node for node, _ in graph.op_nodes()).meta[BRANCH] = 3
    save(describe(graph), graph, tmp_path, {"note": [1, None]})
    again, extra = restore(tmp_path)
    assert extra == {"note": [1, None]}
    assert (again.weights, again.states, again.level) == (graph.weights, graph.states, graph.level)
    assert describe(again) == describe(graph)
    assert [node.meta[BRANCH] for node, _ in again.op_nodes() if BRANCH in node.meta] == [3]
    for (name_a, a), (name_b, b) in zip(
        sorted(graph.module.named_buffers()), sorted(again.module.named_buffers()), strict=True
    ):
        assert name_a == name_b and torch.equal(a, b) and a.dtype == b.dtype
    calls = [line.split(" = ")[1] for line in graph_text(graph).splitlines() if " = " in line]
    assert [line.split(" = ")[1] for line in graph_text(again).splitlines() if " = " in line] == calls


def test_a_function_that_is_no_named_operator_is_refused() -> None:
    graph = captured(Sketch())
    node = graph.nodes(torch.ops.aten.linear.default)[0]
    node.target = lambda x, w: x
    with pytest.raises(NotSavable, match="no named operator"):
        describe(graph)
    node.target = operator.matmul
    describe(graph)


def test_a_graph_inside_the_graph_is_refused() -> None:
    graph = captured(Sketch())
    graph.module.add_module("inner", torch.nn.Identity())
    with pytest.raises(NotSavable, match="inside"):
        describe(graph)


def test_an_argument_that_is_no_data_is_refused() -> None:
    graph = captured(Sketch())
    node = graph.nodes(torch.ops.aten.linear.default)[0]
    node.args = (*node.args, torch.Generator)
    with pytest.raises(NotSavable, match="a value of type"):
        describe(graph)
