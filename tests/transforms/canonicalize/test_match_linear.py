"""MatchLinear: every way to multiply by a weight becomes `linear`, the weight transposed by recipe if need be."""

import pytest
import torch
from torch import Tensor, nn

from autodeploy.transforms.canonicalize.match_linear import MatchLinear
from tests.graphs import Sketch, captured, counts, run


def by_module(self: nn.Module, x: Tensor) -> Tensor:
    return self.linear(x)


def by_addmm(self: nn.Module, x: Tensor) -> Tensor:
    return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(x.shape)


def by_matmul(self: nn.Module, x: Tensor) -> Tensor:
    return x @ self.weight


def by_matmul_transposed(self: nn.Module, x: Tensor) -> Tensor:
    return torch.matmul(x, self.weight.t())


@pytest.mark.parametrize("body", [by_module, by_addmm, by_matmul, by_matmul_transposed], ids=lambda body: body.__name__)
def test_fires_with_the_same_numbers(body) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(1)
    model = Sketch(
        body,
        linear=nn.Linear(16, 16),
        weight=nn.Parameter(torch.randn(16, 16)),
        bias=nn.Parameter(torch.randn(16)),
    )
    graph = captured(model)
    before = run(graph, model)
    report = MatchLinear().run(graph)
    assert report.rewritten == 2 and counts(graph) == {"linear": 2}  # the body's and the head's
    torch.testing.assert_close(run(graph, model), before, rtol=1e-5, atol=1e-6)


def test_near_miss_product_of_two_activations() -> None:
    graph = captured(Sketch(lambda self, x: x @ (x.transpose(1, 2) @ x)))
    assert MatchLinear().run(graph).rewritten == 1  # the head alone
    assert len(graph.nodes(torch.ops.aten.matmul.default)) == 2
