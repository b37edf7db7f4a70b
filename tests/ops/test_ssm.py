"""State-space recurrences against transformers' functions, sequence by sequence, long ones included."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.mamba.modeling_mamba import mamba_selective_scan
from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

from autodeploy.ops import selective_scan, ssd

BORDERS = [0, 1, 8, 175]
BOUNDARIES = torch.tensor(BORDERS, dtype=torch.int32)


def _close(result: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    """Expected is computed in float32 from the same, rounded, arguments."""
    tolerance = 2e-2 if dtype == torch.bfloat16 else 1e-4
    scale = float(expected.abs().max())
    torch.testing.assert_close(result.float(), expected.float(), rtol=tolerance, atol=tolerance * scale)


def _selective(seed: int, dtype: torch.dtype) -> dict[str, Any]:
    torch.manual_seed(seed)
    x, dt, z = (torch.randn(1, BORDERS[-1], 6).to(dtype) for _ in range(3))
    B, C = (torch.randn(1, BORDERS[-1], 5).to(dtype) for _ in range(2))
    A, D, dt_bias = -torch.rand(6, 5) * 4, torch.randn(6), torch.randn(6)
    return {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias, "dt_softplus": True}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bare", [False, True])
def test_selective_scan(bare: bool, dtype: torch.dtype) -> None:
    call = _selective(0, dtype)
    if bare:
        call |= {"D": None, "z": None, "dt_bias": None, "dt_softplus": False, "dt": call["dt"].abs()}
    result = selective_scan.reference(**call, cu_seqlens=BOUNDARIES)
    assert result.dtype == dtype
    exact = {name: value.float() if isinstance(value, Tensor) else value for name, value in call.items()}
    for start, end in itertools.pairwise(BORDERS):
        cut = [None if exact[n] is None else exact[n][:, start:end].transpose(1, 2) for n in ("x", "dt", "B", "C", "z")]
        rest = {"delta_bias": exact["dt_bias"], "delta_softplus": exact["dt_softplus"]}
        expected = mamba_selective_scan(cut[0], cut[1], exact["A"], cut[2], cut[3], exact["D"], cut[4], **rest)
        _close(result[:, start:end].transpose(1, 2), expected, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bare", [False, True])
def test_ssd(bare: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    x, dt, B, C = (torch.randn(1, BORDERS[-1], *shape).to(dtype) for shape in ((4, 3), (4,), (2, 5), (2, 5)))
    A, D, dt_bias = -torch.rand(4) * 4, torch.randn(4), torch.randn(4)
    dt = dt.abs() if bare else dt
    rest: dict[str, Any] = {"D": None, "dt_bias": None, "dt_softplus": False}
    limits = (0.0, float("inf"))
    if not bare:
        rest, limits = {"D": D, "dt_bias": dt_bias, "dt_softplus": True}, (0.2, 1.5)
    result = ssd.reference(
        x, dt, A, B, C, **rest, dt_min=limits[0], dt_max=None if bare else limits[1], cu_seqlens=BOUNDARIES
    )
    assert result.dtype == dtype
    for start, end in itertools.pairwise(BORDERS):
        part = slice(start, end)
        cut = [value[:, part].float() for value in (x, dt, B, C)]
        expected = mamba2_chunk_scan(cut[0], cut[1], A, cut[2], cut[3], 16, **rest, dt_limit=limits)
        _close(result[:, part], expected, dtype)


def test_strong_decays_neither_overflow_nor_lose_the_present() -> None:
    """A head that forgets everything at once gives what its own token adds."""
    x, B, C = torch.randn(1, 70, 1, 3), torch.randn(1, 70, 1, 5), torch.randn(1, 70, 1, 5)
    dt = torch.full((1, 70, 1), 40.0)
    result = ssd.reference(x, dt, torch.tensor([-20.0]), B, C, None, None, False, 0.0, None, None)
    torch.testing.assert_close(result, 40.0 * x * (B * C).sum(-1, keepdim=True))
