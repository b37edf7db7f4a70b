"""FoldWeights: work on weights alone moves into recipes, one reading each; shared weights and activations stay."""

import pytest
import torch
from torch import Tensor, nn

from autodeploy.checkpoint.recipe import Cast, Pointwise
from autodeploy.transforms.canonicalize import fold_weights
from autodeploy.transforms.canonicalize.fold_weights import FoldWeights
from autodeploy.transforms.canonicalize.match_linear import MatchLinear
from tests.graphs import Sketch, captured, run

aten = torch.ops.aten


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
        return x @ self.w.cumsum(0) @ self.w[:4].t() @ self.w[:4]

    graph = captured(Sketch(body, w=nn.Parameter(torch.randn(16, 16))))
    weights = set(graph.weights)
    report = FoldWeights().run(graph)
    assert report.rewritten == 0 and all("also read elsewhere" in reason for reason in report.refused)
    assert set(graph.weights) == weights


def rates(self: nn.Module, x: Tensor) -> Tensor:
    return x * -torch.exp(self.rate.float()) + 1.5 * self.rate.sigmoid()


def one_minus(self: nn.Module, x: Tensor) -> Tensor:
    return x * (1 - self.rate) * (self.rate.double() > 0)


@pytest.mark.parametrize(("body", "folded"), [(rates, 5), (one_minus, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_arithmetic_of_a_weight_alone_has_the_same_bits(body, folded: int, dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(1)
    model = Sketch(lambda self, x: body(self, x).to(dtype), rate=nn.Parameter(torch.randn(16))).to(dtype)
    graph = captured(model)
    before = run(graph, model)
    report = FoldWeights().run(graph)
    assert report.rewritten == report.found == folded and not report.refused
    assert not [node for node in graph.graph.nodes if node.target in (aten.exp.default, aten.sigmoid.default)]
    assert torch.equal(run(graph, model), before)


@pytest.mark.parametrize(
    "body",
    [
        lambda self, x: x.exp() * self.w.sum(),
        lambda self, x: x + self.w.softmax(0),
        lambda self, x: x * (self.w + self.embed.weight[0]).cumsum(0),
        lambda self, x: x + torch.bernoulli(self.w, 0.5),
    ],
    ids=["activations", "reductions", "two weights", "chance"],
)
def test_near_miss_what_is_more_than_one_weight_by_elements_stays(body) -> None:  # type: ignore[no-untyped-def]
    graph = captured(Sketch(body, w=nn.Parameter(torch.rand(16))))
    report = FoldWeights().run(graph)
    assert not any(isinstance(recipe, Cast | Pointwise) for recipe in graph.weights.values())
    assert report.rewritten == 0


@pytest.mark.parametrize("is_shared", [True, False])
def test_a_large_weight_is_not_kept_in_more_memory(is_shared: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fold_weights, "_MOST_ADDED_BYTES", 16 * 16 * 4)

    def body(self: nn.Module, x: Tensor) -> Tensor:
        wide = x @ self.w.double().cumsum(0).float()
        return wide @ self.w.cumsum(0) if is_shared else wide

    graph = captured(Sketch(body, w=nn.Parameter(torch.randn(16, 16))))
    report = FoldWeights().run(graph)
    assert (report.found, report.rewritten) == (1, 0 if is_shared else 1)
    assert all("more than weight w" in reason for reason in report.refused)


def test_products_take_their_transposes_first() -> None:
    graph = captured(Sketch(lambda self, x: x @ self.w.t(), w=nn.Parameter(torch.randn(16, 16))))
    assert MatchLinear().run(graph).rewritten == 2
    assert FoldWeights().run(graph).found == 0
    assert all(str(recipe) == recipe.sources()[0] for recipe in graph.weights.values())
