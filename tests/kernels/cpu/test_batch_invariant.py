"""Rows of products have the same bits alone and among others; those of the usual kernels need not."""

import pytest
import torch

from autodeploy.kernels.cpu.batch_invariant import linear_row_by_row, quantized_linear_row_by_row
from autodeploy.ops.linear import linear
from autodeploy.ops.quantized_linear import quantized_linear


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [24, 576, 1001])
def test_a_row_of_a_product_has_the_same_bits_among_others(dtype: torch.dtype, width: int) -> None:
    generator = torch.Generator().manual_seed(width)
    x = torch.randn(1, 77, width, generator=generator).to(dtype)
    weight, bias = torch.randn(40, width, generator=generator).to(dtype), torch.randn(40, generator=generator).to(dtype)
    whole = linear_row_by_row(x, weight, bias)
    for count in range(1, 20):
        for first in (0, 1, 2, 3, 41):
            part = linear_row_by_row(x[:, first : first + count], weight, bias)
            assert torch.equal(part, whole[:, first : first + count])
    torch.testing.assert_close(whole, linear.reference(x, weight, bias), rtol=2e-2, atol=1e-1)


def test_the_usual_product_may_differ() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(64, 576, generator=generator), torch.randn(40, 576, generator=generator)
    usual = linear.kernels["cpu"].function
    assert not torch.equal(usual(x, weight, None)[:1], usual(x[:1], weight, None))


def test_a_row_of_a_quantised_product_has_the_same_bits_among_others() -> None:
    for sample in quantized_linear.samples():
        whole = quantized_linear_row_by_row(**sample)
        rows = sample["x"].reshape(-1, sample["x"].shape[-1])
        for at in range(len(rows)):
            alone = quantized_linear_row_by_row(**sample | {"x": rows[at : at + 1]})
            assert torch.equal(alone, whole.reshape(len(rows), -1)[at : at + 1])
