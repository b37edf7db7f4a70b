"""Quantising: how far each weight may move, which grids come back exactly, and values at the edges of float16."""

import gguf
import pytest
import torch
from torch import Tensor

from autodeploy.checkpoint.quantize import Float4Format, Float8Format, NumberFormat, quantize_rows
from autodeploy.ops import fp8_linear, nvfp4_linear
from autodeploy.ops.quantized_linear import dequantize

FORMATS = [
    NumberFormat(8, None),
    NumberFormat(8, 32),
    NumberFormat(8, 32, has_offsets=True),
    NumberFormat(4, None),
    NumberFormat(4, 64),
    NumberFormat(4, 32),
    NumberFormat(4, 32, has_offsets=True),
    NumberFormat(4, 128, has_offsets=True),
]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def there_and_back(rows: Tensor, number_format: NumberFormat) -> Tensor:
    parts = quantize_rows(rows, number_format)
    return dequantize(parts["numbers"], parts["scales"], parts.get("offsets"), *rows.shape)


@pytest.mark.parametrize("number_format", FORMATS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_weight_moves_further_than_its_format_allows(number_format: NumberFormat, dtype: torch.dtype) -> None:
    rows = (draw(40, 256) * draw(40, 1, seed=1)).to(dtype)
    moved = (there_and_back(rows, number_format) - rows.float()).unflatten(1, (number_format.num_groups(256), -1)).abs()
    groups = rows.float().unflatten(1, (number_format.num_groups(256), -1))
    least, largest = groups.aminmax(dim=-1, keepdim=True)
    extreme = groups.abs().amax(-1, keepdim=True)
    if number_format.has_offsets:
        step = (largest - least) / (2**number_format.bits - 1)
        allowed = 0.5 * step + 1e-3 * extreme
    elif number_format.bits == 8:
        allowed = 0.502 * extreme / 127
    else:
        allowed = 1.2 * extreme / 7  # the largest may be cut off, for less error of all others
    assert (moved <= allowed + 1e-6).all()
    assert moved.square().mean() < 0.4 * allowed.square().mean()


@pytest.mark.parametrize("block_size", [None, 128])
def test_floating_point_keeps_four_bits_of_each_weight(block_size: int | None) -> None:
    number_format, rows = Float8Format(block_size), draw(150, 200) * draw(150, 1, seed=1)
    parts = number_format.quantize(rows, None)
    for part, value in parts.items():
        assert (value.shape, value.dtype) == (number_format.shape(part, 150, 200), number_format.dtype(part))
    matrix = fp8_linear(torch.eye(200), parts["numbers"], parts["scales"], None, block_size).t()
    # of a scale's largest, 448, numbers are 2^-9 apart at least; an identity is rounded to itself
    largest = rows.abs().amax(1, keepdim=True) if block_size is None else rows.abs().max()
    assert ((matrix - rows).abs() <= rows.abs() * 2**-4 * 1.001 + largest / 448 * 2**-10 * 1.001).all()
    if block_size is None:
        torch.testing.assert_close(matrix.abs().amax(1), rows.abs().amax(1), rtol=1e-5, atol=0)
    else:
        torch.testing.assert_close(matrix[:128, :128].abs().max(), rows[:128, :128].abs().max(), rtol=1e-5, atol=0)


def test_four_bits_of_floating_point_take_the_nearest_number_of_their_group() -> None:
    number_format, rows = Float4Format(), draw(40, 64) * draw(40, 4, seed=1).repeat_interleave(16, 1)
    rows[3, :16] = 0
    parts = number_format.quantize(rows, float(rows.abs().max()))
    for part, value in parts.items():
        assert (value.shape, value.dtype) == (number_format.shape(part, 40, 64), number_format.dtype(part))
    matrix = nvfp4_linear(torch.eye(64), *(parts[part] for part in number_format.parts), None).t()
    steps = (parts["scales"].float() * parts["tensor_scale"]).repeat_interleave(16, 1)
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    nearest = (rows.abs()[..., None] - levels * steps[..., None]).abs().amin(-1)
    torch.testing.assert_close((matrix - rows).abs(), nearest, rtol=1e-4, atol=1e-6)
    assert matrix[3, :16].eq(0).all()
    # scales are used to the full: the largest weight of all is kept, and of most groups nearly
    assert abs(matrix.abs().max() / rows.abs().max() - 1) < 1e-3
    assert ((matrix - rows).norm() / rows.norm()) < 0.12


def test_rows_without_groups_may_have_any_size() -> None:
    rows = draw(37, 45)
    assert (there_and_back(rows, NumberFormat(8, None)) - rows).abs().max() <= 0.51 * rows.abs().max() / 127


@pytest.mark.parametrize(
    ("kind", "number_format"),
    [
        (gguf.GGMLQuantizationType.Q4_0, NumberFormat(4, 32)),
        (gguf.GGMLQuantizationType.Q4_1, NumberFormat(4, 32, has_offsets=True)),
        (gguf.GGMLQuantizationType.Q8_0, NumberFormat(8, 32)),
    ],
    ids=lambda value: str(value),
)
def test_weights_on_the_grid_of_a_gguf_format_come_back(
    kind: gguf.GGMLQuantizationType, number_format: NumberFormat
) -> None:
    values = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(draw(48, 128).numpy(), kind), kind))
    error = (there_and_back(values, number_format) - values).abs().max()
    assert error < 2e-3, "less than the float16 of a scale loses over its levels"
    # Read as bfloat16 the levels are still found: an error of a level would be a fifteenth of the largest weight.
    error = (there_and_back(values.bfloat16(), number_format) - values).abs().max()
    assert error < 0.01 * values.abs().max()


def test_four_bits_around_zero_lose_less_than_the_usual_rounding() -> None:
    rows, kind = draw(64, 256), gguf.GGMLQuantizationType.Q4_0
    usual = torch.from_numpy(gguf.quants.dequantize(gguf.quants.quantize(rows.numpy(), kind), kind))
    mine = there_and_back(rows, NumberFormat(4, 32))
    assert (mine - rows).square().mean() < 0.9 * (usual - rows).square().mean()


@pytest.mark.parametrize("number_format", FORMATS, ids=str)
def test_zeros_and_extremes_of_float16_stay_finite(number_format: NumberFormat) -> None:
    rows = draw(16, 128)
    rows[0], rows[1], rows[2], rows[3] = 0, 3e38, 1e-12, rows[3] * 1e-5
    back = there_and_back(rows, number_format)
    assert back.isfinite().all() and back[0].eq(0).all() and (back[2].abs() < 1e-6).all()
    assert (back[3] - rows[3]).abs().max() < 0.3 * rows[3].abs().max()
