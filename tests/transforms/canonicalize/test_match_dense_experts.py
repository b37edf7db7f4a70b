"""MatchDenseExperts: zeros multiplied by every expert are left out; what may not be zero stays."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autodeploy.checkpoint.recipe import Transpose
from autodeploy.transforms.canonicalize.fold_weights import FoldWeights
from autodeploy.transforms.canonicalize.match_dense_experts import MatchDenseExperts
from tests.graphs import Sketch, captured, counts, run

NUM_EXPERTS, HIDDEN, WIDTH = 5, 16, 12


def _dense(fill: float, score: Callable[[Tensor], Tensor], num_choices: int) -> Callable[[nn.Module, Tensor], Tensor]:
    def body(self: nn.Module, x: Tensor) -> Tensor:
        flat = x.reshape(-1, HIDDEN)
        logits = self.router(flat)
        values, chosen = torch.topk(logits, num_choices, dim=1)
        scores = score(torch.full_like(logits, fill).scatter_(1, chosen, values))
        rows = flat.repeat(NUM_EXPERTS, 1) * scores.transpose(0, 1).reshape(-1, 1)
        gate, up = torch.bmm(rows.view(NUM_EXPERTS, -1, HIDDEN), self.gate_up).chunk(2, dim=-1)
        out = torch.bmm(up * F.silu(gate), self.down).view(-1, HIDDEN)
        return out.reshape(NUM_EXPERTS, -1, HIDDEN).sum(dim=0).view(x.shape)

    return body


def _model(body: Callable[[nn.Module, Tensor], Tensor]) -> nn.Module:
    torch.manual_seed(0)
    stacks = {"gate_up": torch.randn(NUM_EXPERTS, HIDDEN, 2 * WIDTH), "down": torch.randn(NUM_EXPERTS, WIDTH, HIDDEN)}
    weights = {name: nn.Parameter(stack * 0.3) for name, stack in stacks.items()}
    return Sketch(body, router=nn.Linear(HIDDEN, NUM_EXPERTS), **weights)


@pytest.mark.parametrize("num_choices", [1, 3])
def test_fires_with_the_same_numbers(num_choices: int) -> None:
    model = _model(_dense(float("-inf"), torch.sigmoid, num_choices))
    graph = captured(model)
    before = run(graph, model)
    report = MatchDenseExperts().run(graph)
    assert report.rewritten == report.expected == 1 and counts(graph)["moe"] == 1
    assert not graph.nodes(torch.ops.aten.bmm.default)
    torch.testing.assert_close(run(graph, model), before, rtol=1e-4, atol=1e-5)
    assert FoldWeights().run(graph).rewritten == 2
    assert sum(isinstance(recipe, Transpose) for recipe in graph.weights.values()) == 2


@pytest.mark.parametrize(("fill", "score"), [(0.0, torch.sigmoid), (float("-inf"), lambda x: x.exp().add(0.1).relu())])
def test_near_miss_unchosen_experts_that_count_are_refused(fill: float, score: Callable[[Tensor], Tensor]) -> None:
    graph = captured(_model(_dense(fill, score, 2)))
    report = MatchDenseExperts().run(graph)
    assert (report.found, report.rewritten) == (1, 0) and "unchosen" in report.refused[0]
    assert len(graph.nodes(torch.ops.aten.bmm.default)) == 2


def test_other_sums_are_none_of_its_business() -> None:
    graph = captured(Sketch(lambda self, x: x + x.exp().sum(0)))
    assert MatchDenseExperts().run(graph).found == 0
