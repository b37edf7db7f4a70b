"""rms_norm and add_rms_norm by FlashInfer: the scale is applied in float32, before rounding."""

import flashinfer
import torch
from torch import Tensor

from autodeploy.kernels.flashinfer.attention import DTYPES
from autodeploy.ops.norm import add_rms_norm, rms_norm


def _why_refused(x: Tensor, weight: Tensor | None, weight_offset: float) -> str | None:
    if weight is None or weight_offset:
        return "no scale, or one with an offset"
    if x.dtype not in DTYPES or weight.dtype != x.dtype:
        return f"{x.dtype} with a scale of {weight.dtype}; there are kernels for bfloat16 and float16"
    return None


def _supports_norm(
    x: Tensor, weight: Tensor | None, eps: float, weight_offset: float, scale_in_float32: bool
) -> str | None:
    return _why_refused(x, weight, weight_offset)


def _supports_sum(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, weight_offset: float, scale_in_float32: bool
) -> str | None:
    return _why_refused(x, weight, weight_offset)


@rms_norm.kernel("flashinfer", _supports_norm)
def rms_norm_flashinfer(
    x: Tensor, weight: Tensor | None, eps: float, weight_offset: float, scale_in_float32: bool
) -> Tensor:
    """`rms_norm` of rows that are copied where they have gaps."""
    rows = x.reshape(-1, x.shape[-1])
    normed = torch.empty(rows.shape, dtype=x.dtype, device=x.device)
    flashinfer.rmsnorm(rows, weight, eps, out=normed)
    return normed.view(x.shape)


@add_rms_norm.kernel("flashinfer", _supports_sum)
def add_rms_norm_flashinfer(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, weight_offset: float, scale_in_float32: bool
) -> tuple[Tensor, Tensor]:
    """`add_rms_norm` in two steps: FlashInfer's one step works in place, and copies would cost more than it saves."""
    total = x + residual
    return rms_norm_flashinfer(total, weight, eps, weight_offset, scale_in_float32), total
