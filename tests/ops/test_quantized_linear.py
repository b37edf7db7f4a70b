"""quantized_linear: its layout number by number, its meaning as a plain loop, and what rounding activations costs."""

import pytest
import torch
from torch import Tensor

from autodeploy.ops import quantized_linear
from autodeploy.ops.quantized_linear import dequantize, pack, packed_shape, round_activations, unpack


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(16, 32), (1, 1), (37, 45), (40, 96)])
def test_where_each_number_lies(bits: int, num_outputs: int, num_inputs: int) -> None:
    numbers = torch.randint(0, 2**bits, (num_outputs, num_inputs), dtype=torch.uint8)
    packed = pack(numbers, bits)
    assert packed.shape == packed_shape(num_outputs, num_inputs, bits) and packed.is_contiguous()
    for o in range(num_outputs):
        for i in range(num_inputs):
            quad = i % 32 // 4
            place = packed[o // 16, i // 32, quad if bits == 8 else quad // 2, o % 16, i % 4]
            number = place if bits == 8 else place >> 4 if quad % 2 else place & 15
            assert number == numbers[o, i]
    assert torch.equal(unpack(packed, num_outputs, num_inputs), numbers)
    beyond = unpack(packed, -(-num_outputs // 16) * 16, -(-num_inputs // 32) * 32)
    assert beyond[num_outputs:].eq(2 ** (bits - 1)).all() and beyond[:, num_inputs:].eq(2 ** (bits - 1)).all()


def _by_hand(sample: dict[str, Tensor | None]) -> Tensor:
    """The product one output and one block of inputs at a time."""
    x, weight, scales, offsets, bias = (sample[name] for name in ("x", "weight", "scales", "offsets", "bias"))
    assert x is not None and weight is not None and scales is not None
    num_inputs, num_outputs, bits = x.shape[-1], int(sample["num_outputs"]), weight.shape[2]  # type: ignore[arg-type]
    numbers, group = unpack(weight, num_outputs, num_inputs).double(), num_inputs // scales.shape[1]
    out = torch.zeros(x.numel() // num_inputs, num_outputs, dtype=torch.float64)
    for row, values in enumerate(x.reshape(-1, num_inputs)):
        for start in range(0, num_inputs, 32):
            block = values[start : start + 32]
            step = block.abs().max() / 127
            rounded = (block / step).round().double() * step.double()
            for o in range(num_outputs):
                place = o // 16, start // group, o % 16
                scale = float(scales[place])
                offset = -scale * 2 ** (bits - 1) if offsets is None else float(offsets[place])
                out[row, o] += rounded @ (scale * numbers[o, start : start + 32] + offset)
    return (out if bias is None else out + bias.double()).view(*x.shape[:-1], num_outputs)


def test_is_what_a_plain_loop_gives() -> None:
    assert quantized_linear.samples is not None
    for sample in quantized_linear.samples():
        expected = _by_hand(sample)
        torch.testing.assert_close(quantized_linear(**sample).double(), expected, rtol=1e-4, atol=1e-4)


def test_activations_move_by_half_a_step_of_their_block_at_most() -> None:
    x = torch.randn(5, 70) * torch.tensor([1e-6, 1.0, 1e3, 1.0, 1e20])[:, None]
    rounded = round_activations(x)
    for start in (0, 32, 64):
        block, moved = x[:, start : start + 32], rounded[:, start : start + 32]
        step = block.abs().amax(-1, keepdim=True) / 127
        assert ((block - moved).abs() <= 0.5001 * step).all() and not torch.equal(block, moved)
    assert torch.equal(round_activations(rounded[1:4]), rounded[1:4])


def test_zeros_stay_zeros_and_what_is_not_finite_stays_in_its_block() -> None:
    x = torch.ones(3, 64)
    x[0], x[1, 3], x[2, 40] = 0, float("inf"), float("nan")
    rounded = round_activations(x)
    assert rounded[0].eq(0).all()
    assert rounded[1, :32].isnan().all() and rounded[1, 32:].eq(1).all()
    assert rounded[2, 32:].isnan().all() and rounded[2, :32].eq(1).all()
    weight, scales = pack(torch.full((16, 64), 200, dtype=torch.uint8), 8), torch.ones(1, 1, 16).half()
    result = quantized_linear(x, weight, scales, None, None, 16)
    assert result[0].eq(0).all() and result[1:].isnan().all()


def test_a_row_is_the_same_alone_and_among_others() -> None:
    assert quantized_linear.samples is not None
    sample = next(sample for sample in quantized_linear.samples() if sample["x"].shape[1] > 5)
    together = quantized_linear(**sample)
    alone = quantized_linear(**sample | {"x": sample["x"][:, 3:4]})
    torch.testing.assert_close(alone, together[:, 3:4], rtol=1e-6, atol=1e-6)


def test_dequantised_is_float32_whatever_scales_are() -> None:
    weight, scales = pack(torch.full((16, 32), 9, dtype=torch.uint8), 4), torch.full((1, 1, 16), 0.25).half()
    assert torch.equal(dequantize(weight, scales, None, 16, 32), torch.full((16, 32), 0.25))
    assert torch.equal(dequantize(weight, scales, scales, 16, 32), torch.full((16, 32), 2.5))
