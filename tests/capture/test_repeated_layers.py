"""Layers that are alike, written out, give the graph of a full trace, node for node; what is not alike is traced."""

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autodeploy.capture.export import capture
from autodeploy.graph.model_graph import ModelGraph
from autodeploy.graph.text import diff_text, graph_text
from autodeploy.models.instantiate import instantiate
from tests import tiny
from tests.graphs import Sketch

DEPTH = 6


def _deeper(name: str) -> nn.Module:
    """A tiny model's architecture with six layers, its lists of three per-layer entries doubled."""
    config = tiny.TINY[name]().config
    fields = {key: value * 2 for key, value in vars(config).items() if isinstance(value, list) and len(value) == 3}
    for key, value in ({"num_hidden_layers": DEPTH} | fields).items():
        setattr(config, key, value)
    return instantiate(config, dtype=torch.float32)


def _both(model: nn.Module) -> tuple[ModelGraph, ModelGraph]:
    return capture(model.eval(), repeat_layers=False), capture(model)


def _require_same(full: ModelGraph, repeated: ModelGraph) -> None:
    assert diff_text(graph_text(full), graph_text(repeated)) == ""
    assert full.weights == repeated.weights and list(full.weights) == list(repeated.weights)
    assert (full.max_length, full.state_writes) == (repeated.max_length, repeated.state_writes)
    stacks = [[node.meta.get("nn_module_stack") for node in graph.graph.nodes] for graph in (full, repeated)]
    assert stacks[0] == stacks[1]


# How many of six layers need not be traced: three of a kind are, the first, the second and the last.
@pytest.mark.parametrize(
    ("name", "repeated"),
    [("gpt2", 3), ("phi3", 3), ("starcoder2", 3), ("gemma3_text", 1), ("smollm3", 1)],
)
def test_graph_is_that_of_a_full_trace(name: str, repeated: int) -> None:
    full, graph = _both(_deeper(name))
    _require_same(full, graph)
    assert graph.repetition == f"{repeated} of {DEPTH} layers were written out from ones like them"


class _Layer(nn.Module):
    """A residual layer whose code is `body(self, x)`, so that each test can make its own near miss."""

    def __init__(self, index: int, body: Callable[..., Tensor]):
        super().__init__()
        self.layer_idx, self.body = index, body
        self.project = nn.Linear(16, 16)
        self.act = functools.partial(nn.functional.gelu, approximate="tanh")

    def forward(self, x: Tensor, **context: Any) -> Tensor:
        return x + self.act(self.body(self, x, **context))


def _stack(body: Callable[..., Tensor], depth: int = 7, context: Callable[[], dict[str, Any]] = dict) -> Sketch:
    def run(self: Sketch, x: Tensor) -> Tensor:
        shared = context()
        for layer in self.layers:
            x = layer(x, **shared)
        return x

    return Sketch(run, layers=nn.ModuleList(_Layer(index, body) for index in range(depth)))


def test_long_stack_is_traced_three_times() -> None:
    calls: list[int] = []

    def body(self: _Layer, x: Tensor) -> Tensor:
        calls.append(1)
        return self.project(x)

    model = _stack(body, depth=20)
    graph = capture(model.eval())
    assert len(calls) == 3 and graph.repetition.startswith("17 of 20 layers")
    assert {f"layers.{i}.project.weight" for i in range(20)} <= {str(recipe) for recipe in graph.weights.values()}
    _require_same(capture(model, repeat_layers=False), graph)
    assert all("forward" not in vars(layer) and type(layer.layer_idx) is int for layer in model.layers)


def test_results_and_constants_of_several_kinds() -> None:
    """Tuples, a tensor handed through, constants made on the way, and in-place arithmetic on own values."""

    class Pair(_Layer):
        def forward(self, x: Tensor, **context: Any) -> Any:  # type: ignore[override]
            y = self.project(x) * torch.tensor([1.5])
            y.mul_(2)
            return x + y, None, x

    def run(self: Sketch, x: Tensor) -> Tensor:
        for layer in self.layers:
            x, nothing, before = layer(x)
            x = x - before
            assert nothing is None
        return x

    model = Sketch(run, layers=nn.ModuleList(Pair(index, torch.relu) for index in range(6)))
    full, graph = _both(model)
    assert graph.repetition.startswith("3 of 6")
    targets = [[node.target for node in g.graph.nodes if node.op == "call_function"] for g in (full, graph)]
    assert targets[0] == targets[1]


_LIST = [0.5] * 10
_CALLS: list[int] = []


def _compares(self: _Layer, x: Tensor) -> Tensor:
    return self.project(x) if self.layer_idx != 3 else x


def _looks_up(self: _Layer, x: Tensor) -> Tensor:
    return self.project(x) * _LIST[self.layer_idx]


def _counts(self: _Layer, x: Tensor) -> Tensor:
    _CALLS.append(1)
    return self.project(x) * len(_CALLS)


def _keeps(self: _Layer, x: Tensor, memory: dict[str, Tensor]) -> Tensor:
    memory["last"] = self.project(x) + memory.get("last", 0)
    return memory["last"]


class _Box:
    value: Tensor | None = None


def _hides(self: _Layer, x: Tensor, box: _Box) -> Tensor:
    before, box.value = box.value, self.project(x)
    return box.value if before is None else box.value + before


def _overwrites(self: _Layer, x: Tensor) -> Tensor:
    return x.add_(self.project(x.clone()))


@pytest.mark.parametrize(
    ("body", "context", "reason"),
    [
        (_compares, dict, "looks at its own index"),
        (_looks_up, dict, "looks at its own index"),
        (_counts, dict, "differ"),
        (_keeps, lambda: {"memory": {}}, "changes a container"),
        (_hides, lambda: {"box": _Box()}, "an inner value of"),
        (_overwrites, dict, "in place"),
    ],
)
def test_what_is_not_proved_alike_is_traced(body: Any, context: Any, reason: str) -> None:
    _CALLS.clear()
    model = _stack(body, context=context)
    full = capture(model.eval(), repeat_layers=False)
    _CALLS.clear()
    graph = capture(model)
    assert reason in graph.repetition
    if body is not _counts:  # which goes on counting when it is traced again
        _require_same(full, graph)


def test_layers_that_differ_in_a_number_or_share_weights_are_kinds_of_their_own() -> None:
    model = _stack(lambda self, x: self.project(x) * self.factor)
    for index, layer in enumerate(model.layers):
        layer.factor = [1.0, 2.0][index % 2]
    full, graph = _both(model)
    _require_same(full, graph)
    assert graph.repetition.startswith("1 of 7")  # four with the first factor, three with the second
    tied = _stack(lambda self, x: self.project(x))
    for layer in tied.layers[:4]:
        layer.project = tied.layers[0].project
    full, graph = _both(tied)
    _require_same(full, graph)
    assert graph.repetition.startswith("0 of 3")


def test_errors_are_those_of_a_full_trace() -> None:
    def fails(self: _Layer, x: Tensor) -> Tensor:
        return self.project(x) if x.sum() > 0 else x

    with pytest.raises(Exception, match=r"in module layers\.0 \(_Layer\)"):
        capture(_stack(fails).eval())
