"""Products of float8 numbers by torch's library, `torch._scaled_mm`, where a weight has a scale per row.

Devices of compute capability 9.0 and newer take scales of rows into the product, for bfloat16 results; on others, and
for other results, the product is of plain numbers in float32, which is scaled afterwards.
"""

import torch
from torch import Tensor

_BY_ROW_CAPABILITY = (9, 0)
_WHOLE = 16
"""Inputs and outputs come in multiples of it."""


def is_for_library(weight: Tensor, block_size: int | None) -> bool:
    """Whether the library takes a weight `[O, I]` on its device."""
    return weight.device.type == "cuda" and block_size is None and all(size % _WHOLE == 0 for size in weight.shape)


def multiply_by_library(
    rows: Tensor, x_scales: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Products `[N, O]` of a dtype.

    Args:
        rows: float8_e4m3fn `[N, I]`, contiguous. x_scales: float32 `[N, 1]`.
        weight: float8_e4m3fn `[O, I]`, contiguous. scales: `[O, 1]`. bias: `[O]`, of the dtype.
    """
    if not len(rows):
        return rows.new_empty(0, len(weight), dtype=dtype)
    by_output = scales.float().t().contiguous()
    if dtype == torch.bfloat16 and _takes_scales_of_rows(weight.device):
        return torch._scaled_mm(rows, weight.t(), x_scales, by_output, bias, out_dtype=dtype)
    one = x_scales.new_ones(())
    plain = torch._scaled_mm(rows, weight.t(), one, one, out_dtype=torch.float32)
    scaled = plain.mul_(x_scales).mul_(by_output)
    return (scaled if bias is None else scaled.add_(bias)).to(dtype)


def _takes_scales_of_rows(device: torch.device) -> bool:
    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= _BY_ROW_CAPABILITY
