"""linear: any shape and stride against torch in float64, infinities and NaN where they belong."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from autodeploy.kernels.cpu import linear as linear_module
from autodeploy.kernels.cpu.linear import FEW_ROWS, linear_cpu
from autodeploy.ops import linear

DTYPES = [torch.float32, torch.bfloat16]


def check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    exact = x.double() @ weight.double().T + (0 if bias is None else bias.double())
    tolerance = 1e-5 if x.dtype == torch.float32 else 8e-3
    result = linear_cpu(x, weight, bias)
    assert result.dtype == x.dtype and result.is_contiguous()
    torch.testing.assert_close(result.double(), exact, rtol=tolerance, atol=tolerance * weight.shape[1] ** 0.5)


@given(
    rows=st.integers(0, FEW_ROWS + 30),
    inputs=st.integers(1, 200),
    outputs=st.integers(1, 70),
    bias=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_any_shape(rows: int, inputs: int, outputs: int, bias: bool, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    weight = torch.randn(outputs, inputs).to(dtype)
    check(torch.randn(1, rows, inputs).to(dtype), weight, torch.randn(outputs).to(dtype) if bias else None)


@pytest.mark.parametrize("rows", [1, 3, 33, FEW_ROWS, FEW_ROWS + 1, 700])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_enough_for_threads(rows: int, dtype: torch.dtype) -> None:
    check(torch.randn(1, rows, 576).to(dtype), torch.randn(963, 576).to(dtype), None)


@pytest.mark.parametrize("has_products", [False, True])
def test_many_rows_whatever_torch_makes_of_bfloat16(has_products: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where processors multiply it, many rows are torch's: by our blocks as well as by torch they are right."""
    monkeypatch.setattr(linear_module, "_has_bfloat16_products", lambda: has_products)
    for inputs in (576, 577):
        x, weight = torch.randn(1, FEW_ROWS + 3, inputs), torch.randn(70, inputs)
        check(x.bfloat16(), weight.bfloat16(), torch.randn(70).bfloat16())


@pytest.mark.parametrize("rows", [2, 17, FEW_ROWS + 20])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_do_not_change_a_bit(rows: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, results = torch.randn(1, rows, 66).to(dtype), torch.randn(70, 66).to(dtype), []
    for threads in (1, 2, 3, 7):
        monkeypatch.setattr(linear_module, "num_threads", lambda *_, threads=threads: threads)
        results.append(linear_cpu(x, weight, None))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_inputs(dtype: torch.dtype) -> None:
    wide = torch.randn(1, 3, 96).to(dtype)
    weight = torch.randn(64, 80).to(dtype)
    check(wide[..., 5:69], weight[:, 8:72], None)
    check(wide[..., ::2], torch.randn(64, 48).to(dtype), torch.randn(128).to(dtype)[::2])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "least"), [(FEW_ROWS, 2), (FEW_ROWS + 39, FEW_ROWS + 1)])
def test_a_row_gives_the_same_whatever_its_company(rows: int, least: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, weight = torch.randn(1, rows, 600).to(dtype), torch.randn(80, 600).to(dtype)
    together = linear_cpu(x, weight, None)
    for row in range(0, rows - least + 1, 7):
        alone = slice(row, row + least)
        assert torch.equal(linear_cpu(x[:, alone], weight, None), together[:, alone])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rows", [1, 5, FEW_ROWS + 1])
def test_infinities_and_nan(rows: int, dtype: torch.dtype) -> None:
    inf, nan = float("inf"), float("nan")
    x = torch.ones(1, rows, 40, dtype=dtype)
    weight = torch.ones(4, 40, dtype=dtype)
    weight[0, 39], weight[1, 3], weight[2, 0], weight[2, 39] = inf, nan, inf, -inf
    expected = torch.tensor([inf, nan, nan, 40], dtype=dtype).expand(1, rows, 4)
    torch.testing.assert_close(linear_cpu(x, weight, None), expected, equal_nan=True)


def test_refuses_a_weight_that_is_no_matrix() -> None:
    reason = linear.kernels["cpu"].supports(x=torch.ones(1, 4), weight=torch.ones(2, 4, 4), bias=None)
    assert reason is not None and "shape (2, 4, 4)" in reason
