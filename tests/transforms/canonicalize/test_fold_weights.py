"""FoldWeights: layout work on weights moves into recipes, one reading each; shared weights and activations stay."""

import pytest
import torch
from torch import Tensor, nn

from autodeploy.transforms.canonicalize.fold_weights import FoldWeights
from autodeploy.transforms.canonicalize.match_linear import MatchLinear
from tests.graphs import Sketch, captured, run


def by_transpose(self: nn.Module, x: Tensor) -> Tensor:
    return x @ self.stack.transpose(1, -1).sum(0)


def by_interleaving(self: nn.Module, x: Tensor) -> Tensor:
    apart = self.stack.reshape(3, 8, 2, 16).transpose(1, 2).reshape(3, 16, 16)
    return x @ apart.sum(0)


def by_concatenation(self: nn.Module, x: Tensor) -> Tensor:
    both = torch.cat((self.first.view(2, 8, 16), self.second.view(2, 8, 16)[:, -8:]), 1)
    return x @ both.sum(0)


def by_slice(self: nn.Module, x: Tensor) -> Tensor:
    return x @ self.stack[:2].sum(0)


@pytest.mark.parametrize(
    ("body", "folded"), [(by_transpose, 1), (by_interleaving, 3), (by_concatenation, 4), (by_slice, 1)]
)
def test_fires_with_the_same_numbers(body, folded: int) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(1)
    model = Sketch(
        body,
        stack=nn.Parameter(torch.randn(3, 16, 16)),
        first=nn.Parameter(torch.randn(16, 16)),
        second=nn.Parameter(torch.randn(16, 16)),
    )
    graph = captured(model)
    before = run(graph, model)
    report = FoldWeights().run(graph)
    assert report.rewritten == report.found == folded and not report.refused
    kept = [recipe for recipe in graph.weights.values() if "stack" in str(recipe) or "first" in str(recipe)]
    assert len(kept) == 1 and len(kept[0].sources()) == (2 if body is by_concatenation else 1)
    torch.testing.assert_close(run(graph, model), before)


def test_a_weight_that_is_also_read_as_it_is_stays_one() -> None:
    def body(self: nn.Module, x: Tensor) -> Tensor:
        return x @ self.w.exp() @ self.w[:4].t() @ self.w[:4]

    graph = captured(Sketch(body, w=nn.Parameter(torch.randn(16, 16))))
    weights = set(graph.weights)
    report = FoldWeights().run(graph)
    assert report.rewritten == 0 and all("also read elsewhere" in reason for reason in report.refused)
    assert set(graph.weights) == weights


def test_near_miss_activations_and_arithmetic_stay() -> None:
    model = Sketch(lambda self, x: x.transpose(1, 2).transpose(1, 2) * self.w.exp(), w=nn.Parameter(torch.randn(16)))
    assert FoldWeights().run(captured(model)).found == 0


def test_products_take_their_transposes_first() -> None:
    graph = captured(Sketch(lambda self, x: x @ self.w.t(), w=nn.Parameter(torch.randn(16, 16))))
    assert MatchLinear().run(graph).rewritten == 2
    assert FoldWeights().run(graph).found == 0
    assert all(str(recipe) == recipe.sources()[0] for recipe in graph.weights.values())
