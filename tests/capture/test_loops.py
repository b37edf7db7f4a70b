"""Loops over tokens: the counter that can only index, what is marked, and that everything is put back."""

import builtins
import sys

import pytest
import torch
from torch import Tensor

from autodeploy.capture.loops import LoopIndex
from autodeploy.errors import CaptureError
from autodeploy.ops.captured import NUM_RUNS
from tests.graphs import Sketch, captured


def _own_range() -> bool:
    return "range" in vars(sys.modules[__name__])


def _running_sum(self: Sketch, x: Tensor) -> Tensor:
    assert _own_range(), "the model's code sees a range of its own while it is traced"
    total, sums = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        total = total + x[:, t]
        sums.append(total)
    return torch.stack(sums, dim=1)


def test_a_few_runs_are_traced_and_tagged() -> None:
    stack, cat = torch.stack, torch.cat
    graph = captured(Sketch(_running_sum))
    runs = [node.meta["run"] for node in graph.graph.nodes if "run" in node.meta]
    assert sorted(set(runs)) == [(0, run) for run in builtins.range(NUM_RUNS)]
    assert not _own_range() and torch.stack is stack and torch.cat is cat


def test_other_ranges_are_pythons_own() -> None:
    graph = captured(Sketch(lambda self, x: sum(x * i for i in range(1, 3)) + x))
    assert not any("run" in node.meta for node in graph.graph.nodes)


def test_lists_that_no_loop_made_are_stacked_as_ever() -> None:
    def body(self: Sketch, x: Tensor) -> Tensor:
        return _running_sum(self, x) + torch.stack([x, x, x]).sum(0) + torch.cat([x, x, x], dim=-1)[..., :16]

    graph = captured(Sketch(body))
    targets = [node.target for node in graph.graph.nodes]
    assert targets.count(torch.ops.aten.stack.default) == 1 and targets.count(torch.ops.aten.cat.default) == 1
    assert targets.count(torch.ops.autodeploy.captured_stack.default) == 1


@pytest.mark.parametrize(
    "use",
    [
        lambda t: t == 0,
        lambda t: t % 2,
        lambda t: t > 3,
        lambda t: 2 * t,
        lambda t: 0.9**t,
        lambda t: bool(t),
        lambda t: t // 4,
        lambda t: float(t),
        lambda t: 5 - t,
    ],
)
def test_a_counter_does_nothing_but_index(use: object) -> None:
    with pytest.raises(CaptureError, match="its steps may differ"):
        use(LoopIndex(1))  # type: ignore[operator]
    x = torch.arange(4)
    index = LoopIndex(1)
    assert x[index].item() == 1 and x[index : index + 1].tolist() == [1] and x[index - 1].item() == 0


def test_a_loop_that_looks_at_its_counter_is_refused() -> None:
    def body(self: Sketch, x: Tensor) -> Tensor:
        rows = []
        for t in range(x.shape[1]):
            rows.append(x[:, t] * 2 if t == 0 else x[:, t])
        return torch.stack(rows, dim=1)

    with pytest.raises(CaptureError, match=r"does something else with its counter.*adding-an-op"):
        captured(Sketch(body))
