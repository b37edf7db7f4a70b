"""Products of experts, and the order in which readings are tried."""

import pytest
import torch
from torch import Tensor, nn

from autodeploy.capture.expert_weights import BLOCK, Matrix, expert_weights
from autodeploy.capture.random_weights import with_random_weights


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("first", [None, 5])
def test_a_large_product_by_blocks_is_the_product(transposed: bool, first: int | None) -> None:
    rows, columns = 1100, 1024
    stack = nn.ParameterList([nn.Parameter(torch.empty(2, rows, columns, device="meta"))])
    weight = next(with_random_weights(stack).parameters())
    assert weight[0].numel() > BLOCK
    matrix = Matrix(("w",), (), rows, columns, transposed)
    x = torch.randn(3, matrix.inputs, generator=torch.Generator().manual_seed(0))
    found = matrix.product(lambda name: weight, 1, x, first)
    expected = x.double() @ (weight[1] if transposed else weight[1].t()).double()
    torch.testing.assert_close(found.double(), expected[:, :first], rtol=1e-4, atol=1e-4)


def test_biases_of_children_are_added() -> None:
    generator = torch.Generator().manual_seed(0)
    known = {name: torch.randn(shape, generator=generator) for name, shape in (("w", (1025, 1024)), ("b", (1025,)))}
    x = torch.randn(2, 1024, generator=generator)
    found = Matrix(("-", "w"), ("-", "b"), 1025, 1024).product(known.__getitem__, 1, x)
    torch.testing.assert_close(found, x @ known["w"].t() + known["b"], rtol=1e-4, atol=1e-4)


class Flat(nn.Module):
    """Three matrices of all experts in one, as tall as wide, and several numbers that divide their rows."""

    def __init__(self) -> None:
        super().__init__()
        self.top_k, self.num_experts, self.hidden = 2, 8, 4
        self.w, self.v, self.u = (nn.Parameter(torch.empty(32, 4)) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_a_number_of_experts_by_name_is_tried_first() -> None:
    counts = [reading.num_experts for reading in expert_weights(Flat())]
    assert list(dict.fromkeys(counts)) == [8, 2, 4]
