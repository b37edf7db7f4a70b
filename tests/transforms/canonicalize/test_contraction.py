"""Contraction: the same letters from every op that multiplies matrices, and operands put in a wanted order."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from autodeploy.transforms.canonicalize.contraction import Contraction, rearranged
from tests.graphs import Sketch, captured, run

aten = torch.ops.aten


def _product(form: Callable[[Tensor, Tensor], Tensor], rows: int = 1) -> Contraction:
    def body(self: nn.Module, x: Tensor) -> Tensor:
        left = x.view(1, -1, 4, 4).transpose(1, 2)
        return x + form(left, left.tanh()).sum() * 0

    graph = captured(Sketch(body))
    found = [product for node in graph.graph.nodes if (product := Contraction.of(node)) is not None]
    return found[0]


@pytest.mark.parametrize(
    ("form", "letters"),
    [
        (lambda q, k: q @ k.transpose(2, 3), ("abyz", "abzx", "abyx")),
        (lambda q, k: q @ k[0].transpose(1, 2), ("abyz", "bzx", "abyx")),
        (lambda q, k: torch.bmm(q[0], k[0].transpose(1, 2)), ("ayz", "azx", "ayx")),
        (lambda q, k: torch.einsum("bhqd, bhkd -> bhqk", q, k), ("bhqd", "bhkd", "bhqk")),
    ],
)
def test_letters(form: Callable[[Tensor, Tensor], Tensor], letters: tuple[str, str, str]) -> None:
    product = _product(form)
    assert product.letters == letters
    left, right = torch.randn(1, 4, 3, 4), torch.randn(1, 4, 3, 4)
    equation = f"{letters[0]},{letters[1]}->{letters[2]}"
    factors = [left if len(letters[0]) == 4 else left[0], right if len(letters[1]) == 4 else right[0]]
    if letters[1].endswith("zx"):
        factors[1] = factors[1].transpose(-1, -2)
    torch.testing.assert_close(torch.einsum(equation, *factors), form(left, right))


def test_an_addend_comes_with_its_factors() -> None:
    product = _product(lambda q, k: torch.zeros(1).baddbmm(q[0], k[0].transpose(1, 2), beta=0.5, alpha=2.0))
    assert product.addend is not None and (product.alpha, product.beta) == (2.0, 0.5)


@pytest.mark.parametrize(
    "form",
    [lambda q, k: q * k, lambda q, k: torch.einsum("bhqd,...->bhq", q, k), lambda q, k: torch.einsum("bhqd->bh", q)],
)
def test_near_misses(form: Callable[[Tensor, Tensor], Tensor]) -> None:
    def body(self: nn.Module, x: Tensor) -> Tensor:
        left = x.view(1, -1, 4, 4).transpose(1, 2)
        return x + form(left, left.tanh()).sum() * 0

    graph = captured(Sketch(body))
    products = [node for node in graph.graph.nodes if Contraction.of(node) is not None]
    assert not products


@pytest.mark.parametrize("wanted", ["abc", "acb", "bca", "xabc"])
def test_rearranged(wanted: str) -> None:
    model = Sketch(lambda self, x: x.tanh())
    graph = captured(model)
    source: fx.Node = graph.nodes(aten.tanh.default)[0]
    output = graph.graph.output_node()
    output.args = (rearranged(graph, source, "abc", wanted, output),)
    graph.clean()
    result = run(graph, model, [5])
    ids = torch.randint(0, 32, (1, 5), generator=torch.Generator().manual_seed(0))
    expected = torch.einsum(f"abc->{wanted.replace('x', '')}", model.embed(ids).tanh())
    torch.testing.assert_close(result, expected[None] if "x" in wanted else expected)
