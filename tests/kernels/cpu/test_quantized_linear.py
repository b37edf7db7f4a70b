"""quantized_linear: any shape, stride and grouping against the op, rows to the bit, and what it refuses."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from autodeploy.checkpoint.quantize import NumberFormat, quantize_rows
from autodeploy.kernels.cpu import quantized_linear as kernel
from autodeploy.kernels.cpu.quantized_linear import quantized_linear_cpu
from autodeploy.ops import quantized_linear

DTYPES = [torch.float32, torch.bfloat16]
FORMATS = [
    NumberFormat(8, None),
    NumberFormat(8, 64),
    NumberFormat(8, 32, has_offsets=True),
    NumberFormat(4, None),
    NumberFormat(4, 32),
    NumberFormat(4, 96, has_offsets=True),
]


def sample(
    rows: int, num_inputs: int, num_outputs: int, number_format: NumberFormat, dtype: torch.dtype, seed: int = 0
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(num_outputs, num_inputs, generator=generator) * num_inputs**-0.5
    parts = quantize_rows(matrix, number_format)
    return {
        "x": torch.randn(1, rows, num_inputs, generator=generator).to(dtype),
        "weight": parts["numbers"],
        "scales": parts["scales"],
        "offsets": parts.get("offsets"),
        "bias": torch.randn(num_outputs, generator=generator).to(dtype) if seed % 2 else None,
        "num_outputs": num_outputs,
    }


def check(arguments: dict[str, Any]) -> None:
    result, expected = quantized_linear_cpu(**arguments), quantized_linear.reference(**arguments)
    assert result.dtype == arguments["x"].dtype and result.is_contiguous()
    tolerance = 1e-5 if result.dtype == torch.float32 else 8e-3
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=2 * tolerance)


@given(
    rows=st.integers(0, 20),
    groups=st.integers(1, 3),
    outputs=st.integers(1, 70),
    number_format=st.sampled_from(FORMATS),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_any_shape(
    rows: int, groups: int, outputs: int, number_format: NumberFormat, dtype: torch.dtype, seed: int
) -> None:
    num_inputs = (number_format.group_size or 37) * groups
    check(sample(rows, num_inputs, outputs, number_format, dtype, seed))


@pytest.mark.parametrize("rows", [1, 8, 63, 64, 65, 130])
@pytest.mark.parametrize("number_format", FORMATS, ids=str)
def test_large_enough_for_threads_and_chunks(rows: int, number_format: NumberFormat) -> None:
    check(sample(rows, 576, 200, number_format, torch.float32, seed=rows))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_inputs(dtype: torch.dtype) -> None:
    arguments = sample(3, 96, 40, FORMATS[4], dtype, seed=1)
    expected = quantized_linear_cpu(**arguments)
    strided = {}
    for name in ("x", "weight", "scales", "bias"):
        wide = torch.stack((arguments[name], arguments[name]), dim=-1)
        strided[name] = wide[..., 0]
        assert not strided[name].is_contiguous()
    assert torch.equal(quantized_linear_cpu(**arguments | strided), expected)


@pytest.mark.parametrize("number_format", FORMATS, ids=str)
def test_a_row_is_the_same_to_the_bit_whatever_else_is_in_the_batch(number_format: NumberFormat) -> None:
    arguments = sample(21, 192, 50, number_format, torch.float32)
    together = quantized_linear_cpu(**arguments)
    for rows in (slice(0, 1), slice(3, 5), slice(4, 9), slice(5, 19), slice(20, 21)):
        part = quantized_linear_cpu(**arguments | {"x": arguments["x"][:, rows]})
        assert torch.equal(part, together[:, rows])


def test_threads_do_not_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments, results = sample(5, 192, 100, FORMATS[5], torch.float32), []
    for threads in (1, 2, 3):
        monkeypatch.setattr(kernel, "num_threads", lambda *_, threads=threads: threads)
        results.append(quantized_linear_cpu(**arguments))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinities_and_nan_stay_in_their_row(dtype: torch.dtype) -> None:
    arguments = sample(4, 96, 20, FORMATS[0], dtype)
    clean = quantized_linear_cpu(**arguments)
    arguments["x"][0, 1, 95], arguments["x"][0, 2, 0] = float("nan"), float("-inf")
    result = quantized_linear_cpu(**arguments)
    assert result[0, 1:3].isnan().all()
    assert torch.equal(result[0, 0], clean[0, 0]) and torch.equal(result[0, 3], clean[0, 3])


def test_large_and_tiny_activations() -> None:
    arguments = sample(6, 64, 16, FORMATS[4], torch.float32)
    arguments["x"] = arguments["x"] * torch.tensor([1e-36, 1e-12, 1.0, 1e12, 1e36, 0.0])[None, :, None]
    check(arguments)
    assert quantized_linear_cpu(**arguments)[0, [0, 5]].eq(0).all()


@pytest.mark.parametrize("rows", [2, 4])
@pytest.mark.parametrize("numbers", [0, 255])
@pytest.mark.parametrize("number_format", FORMATS[:1] + FORMATS[2:], ids=str)
def test_extremes_of_both_ranges_do_not_overflow(number_format: NumberFormat, numbers: int, rows: int) -> None:
    arguments = sample(rows, 4032, 16, number_format, torch.float32)
    arguments["weight"].fill_(numbers)
    arguments["x"] = torch.full((1, rows, 4032), -1.0)
    expected = quantized_linear.reference(**arguments)
    torch.testing.assert_close(quantized_linear_cpu(**arguments), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"scales": torch.ones(3, 1, 16)}, "scales torch.float32"),
        ({"weight": torch.zeros(3, 3, 8, 16, 4)}, "weight torch.float32"),
        ({"weight": torch.zeros(3, 3, 2, 16, 4, dtype=torch.uint8)}, "4 or 8 bits"),
        ({"weight": torch.zeros(3, 3, 8, 8, 8, dtype=torch.uint8)}, "shape"),
        ({"bias": torch.ones(40).double()}, "dtype torch.float64"),
    ],
)
def test_refuses_with_the_reason(change: dict[str, Tensor], reason: str) -> None:
    arguments = sample(2, 96, 40, FORMATS[0], torch.float32)
    supports = quantized_linear.kernels["cpu"].supports
    assert supports(**arguments) is None
    assert reason in (supports(**arguments | change) or "")
