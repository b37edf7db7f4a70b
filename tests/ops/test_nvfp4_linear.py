"""nvfp4_linear: where each number lies, its meaning as a plain loop, and rows among others."""

import pytest
import torch
from torch import Tensor

from autodeploy.ops import nvfp4_linear
from autodeploy.ops.nvfp4_linear import LEVELS, dequantize, unpack


def _number(code: int) -> float:
    """By its bits: sign, two of exponent, one of mantissa."""
    sign, exponent, mantissa = -1 if code & 8 else 1, code >> 1 & 3, code & 1
    return float(sign * (mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2 ** (exponent - 1)))


@pytest.mark.parametrize("code", range(16))
def test_numbers_are_what_their_bits_say_the_earlier_in_the_lower_half(code: int) -> None:
    other = (code * 7 + 3) % 16
    found = unpack(torch.tensor([[code | other << 4]], dtype=torch.uint8))
    assert found.tolist() == [[_number(code), _number(other)]]
    assert abs(_number(code)) in LEVELS


def _by_hand(x: Tensor, weight: Tensor, scales: Tensor, tensor_scale: Tensor, bias: Tensor | None) -> Tensor:
    """The product one output and one pair of inputs at a time, in float64."""
    rows = x.reshape(-1, x.shape[-1]).double()
    out = torch.zeros(len(rows), len(weight), dtype=torch.float64)
    for o, packed in enumerate(weight.tolist()):
        for place, byte in enumerate(packed):
            scale = float(scales[o, place // 8]) * float(tensor_scale)
            out[:, o] += (rows[:, 2 * place] * _number(byte & 15) + rows[:, 2 * place + 1] * _number(byte >> 4)) * scale
    return (out if bias is None else out + bias.double()).view(*x.shape[:-1], len(weight))


def test_is_what_a_plain_loop_gives() -> None:
    assert nvfp4_linear.samples is not None
    for sample in nvfp4_linear.samples():
        torch.testing.assert_close(nvfp4_linear(**sample).double(), _by_hand(**sample), rtol=1e-4, atol=1e-4)


def test_numbers_with_their_scales_fit_bfloat16_and_float16() -> None:
    assert nvfp4_linear.samples is not None
    for sample in nvfp4_linear.samples():
        matrix = dequantize(sample["weight"], sample["scales"])
        assert torch.equal(matrix.bfloat16().float(), matrix) and torch.equal(matrix.half().float(), matrix)
