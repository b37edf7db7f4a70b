"""fp8_linear: rounding against torch's own numbers, its meaning as a plain loop, and values at the edges."""

import pytest
import torch
from torch import Tensor

from autodeploy.ops import fp8_linear
from autodeploy.ops.fp8_linear import FLOAT8, as_float8, dequantize, round_activations

ALL_NUMBERS = torch.arange(256, dtype=torch.uint8).view(FLOAT8).float()


def _by_hand(x: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, block_size: int | None) -> Tensor:
    """The product one row, one output and one block of inputs at a time, in float64."""
    num_outputs, num_inputs = weight.shape
    size = block_size or num_inputs
    rows = x.reshape(-1, num_inputs)
    out = torch.zeros(len(rows), num_outputs, dtype=torch.float64)
    for place, row in enumerate(rows):
        for start in range(0, num_inputs, size):
            block = row[start : start + size]
            step = block.abs().max() / 448
            numbers = (block / step).to(FLOAT8).double() * step.double()
            for o in range(num_outputs):
                scale = scales[o if block_size is None else o // size, start // size]
                out[place, o] += numbers @ weight[o, start : start + size].double() * scale.double()
    return (out if bias is None else out + bias.double()).view(*x.shape[:-1], num_outputs)


def test_is_what_a_plain_loop_gives() -> None:
    assert fp8_linear.samples is not None
    for sample in fp8_linear.samples():
        torch.testing.assert_close(fp8_linear(**sample).double(), _by_hand(**sample), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("block_size", [None, 128])
def test_each_value_becomes_the_nearest_number_of_its_scale(block_size: int | None) -> None:
    x = torch.randn(4, 300, generator=torch.Generator().manual_seed(0)) * torch.logspace(-3, 3, 300)
    rounded = round_activations(x, block_size)
    _, scales = as_float8(x, block_size)
    finite = ALL_NUMBERS[ALL_NUMBERS.isfinite()]
    for row in range(4):
        for column in range(0, 300, 7):
            scale = scales[row, 0 if block_size is None else column // block_size]
            nearest = (finite * scale - x[row, column]).abs().min()
            assert (rounded[row, column] - x[row, column]).abs() <= nearest * 1.0001 + 1e-12
    largest = x[:, :128].abs().amax(-1) if block_size else x.abs().amax(-1)
    part = rounded[:, :128] if block_size else rounded
    torch.testing.assert_close(part.abs().amax(-1), largest, rtol=1e-6, atol=0)


def test_zeros_stay_zeros_and_what_is_not_finite_stays_in_its_block() -> None:
    x = torch.ones(3, 256)
    x[0], x[1, 3], x[2, 140] = 0, float("inf"), float("nan")
    rounded = round_activations(x, 128)
    assert rounded[0].eq(0).all() and rounded[1, :128].isnan().all() and rounded[2, 128:].isnan().all()
    assert rounded[1, 128:].eq(1).all() and rounded[2, :128].eq(1).all()
    weight, scales = torch.ones(16, 256).to(FLOAT8), torch.ones(1, 2)
    result = fp8_linear(x, weight, scales, None, 128)
    assert result[0].eq(0).all() and result[1:].isnan().all()


def test_blocks_cover_the_rows_and_inputs_that_they_should() -> None:
    weight = torch.ones(130, 200).to(FLOAT8)
    matrix = dequantize(weight, torch.tensor([[1.0, 2.0], [3.0, 4.0]]), 128)
    assert matrix[127, 127] == 1 and matrix[127, 128] == 2 and matrix[128, 127] == 3 and matrix[129, 199] == 4


def test_a_row_is_the_same_alone_and_among_others() -> None:
    assert fp8_linear.samples is not None
    sample = next(sample for sample in fp8_linear.samples() if sample["x"].shape[1] > 5)
    alone = fp8_linear(**sample | {"x": sample["x"][:, 3:4]})
    torch.testing.assert_close(alone, fp8_linear(**sample)[:, 3:4], rtol=1e-6, atol=1e-6)
