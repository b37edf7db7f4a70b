"""rms_norm, add_rms_norm, gated_rms_norm and layer_norm: each row is read once and kept in registers."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from autodeploy.kernels.triton.launch import Launcher, why_refused
from autodeploy.ops.norm import add_rms_norm, gated_rms_norm, layer_norm, rms_norm

_MAX_WIDTH = 1 << 15
"""Elements of a row up to which they fit into registers."""
_TILE = 1024
"""Elements that a program takes of narrow rows, such as heads."""
_ELEMENTS_PER_WARP = 256
_MAX_WARPS = 16


@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm_rows(
    x,
    residual,
    weight,
    out,
    total,
    num_rows,
    num_inner,
    outer_stride,
    inner_stride,
    width,
    eps,
    weight_offset,
    SCALE_IN_FLOAT32: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = (rows < num_rows)[:, None] & (columns < width)[None, :]
    starts = rows // num_inner * outer_stride + rows % num_inner * inner_stride
    packed = rows[:, None] * width + columns[None, :]
    dtype: tl.constexpr = x.dtype.element_ty
    value = tl.load(x + starts[:, None] + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    if residual is not None:
        value += tl.load(residual + packed, mask=inside, other=0.0).to(tl.float32)
        rounded = value.to(dtype)
        tl.store(total + packed, rounded, mask=inside)
        value = rounded.to(tl.float32)
    normed = value * tl.rsqrt(tl.sum(value * value, 1) / width + eps)[:, None]
    if weight is not None:
        scale = tl.load(weight + columns, mask=columns < width, other=0.0).to(tl.float32) + weight_offset
        if not SCALE_IN_FLOAT32:
            scale = scale.to(dtype).to(tl.float32)
            normed = normed.to(dtype).to(tl.float32)
        normed *= scale[None, :]
    tl.store(out + packed, normed.to(dtype), mask=inside)


@triton.jit
def _activated(value, IS_SILU: tl.constexpr):
    gate = tl.sigmoid(value)
    return value * gate if IS_SILU else gate


@triton.jit(do_not_specialize=["num_rows"])
def _gated_rms_norm_rows(
    x,
    gate,
    weight,
    out,
    num_rows,
    width,
    groups,
    eps,
    IS_SILU: tl.constexpr,
    GATE_FIRST: tl.constexpr,
    SCALE_IN_FLOAT32: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = (rows < num_rows)[:, None] & (columns < width)[None, :]
    places = rows[:, None] * width + columns[None, :]
    dtype: tl.constexpr = x.dtype.element_ty
    value = tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
    gating = _activated(tl.load(gate + places, mask=inside, other=0.0).to(tl.float32), IS_SILU)
    if GATE_FIRST:
        value *= gating
    normed = value * tl.rsqrt(tl.sum(value * value, 1) / width + eps)[:, None]
    own = (rows % groups)[:, None] * width + columns[None, :]
    scale = tl.load(weight + own, mask=inside, other=0.0).to(tl.float32)
    if SCALE_IN_FLOAT32:
        normed *= scale
    else:
        normed = (normed.to(dtype).to(tl.float32) * scale).to(dtype).to(tl.float32)
    if not GATE_FIRST:
        normed *= gating
    tl.store(out + places, normed.to(dtype), mask=inside)


@triton.jit(do_not_specialize=["num_rows"])
def _layer_norm_rows(x, weight, bias, out, num_rows, width, eps, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = (rows < num_rows)[:, None] & (columns < width)[None, :]
    places = rows[:, None] * width + columns[None, :]
    value = tl.load(x + places, mask=inside, other=0.0).to(tl.float32)
    centred = tl.where(inside, value - (tl.sum(value, 1) / width)[:, None], 0.0)
    normed = centred * tl.rsqrt(tl.sum(centred * centred, 1) / width + eps)[:, None]
    if weight is not None:
        normed *= tl.load(weight + columns, mask=columns < width, other=0.0).to(tl.float32)[None, :]
    if bias is not None:
        normed += tl.load(bias + columns, mask=columns < width, other=0.0).to(tl.float32)[None, :]
    tl.store(out + places, normed.to(x.dtype.element_ty), mask=inside)


_rms_norm = Launcher(_rms_norm_rows)
_gated_rms_norm = Launcher(_gated_rms_norm_rows)
_layer_norm = Launcher(_layer_norm_rows)


def _tiles(num_rows: int, width: int) -> tuple[tuple[int], dict[str, int]]:
    """The grid, and the tile of a program: several narrow rows, or one wide one."""
    block = triton.next_power_of_2(width)
    rows = max(1, _TILE // block)
    num_warps = min(_MAX_WARPS, max(1, rows * block // _ELEMENTS_PER_WARP))
    return (triton.cdiv(num_rows, rows),), {"ROWS": rows, "BLOCK": block, "num_warps": num_warps}


def _why_refused(width: int, *tensors: Tensor | None) -> str | None:
    if not 0 < width <= _MAX_WIDTH:
        return f"rows of {width}; there are kernels for up to {_MAX_WIDTH}"
    return why_refused(*tensors)


def _supports(x: Tensor, weight: Tensor | None, eps: float, weight_offset: float, scale_in_float32: bool) -> str | None:
    return _why_refused(x.shape[-1], x, weight)


@rms_norm.kernel("triton", _supports, fuses_with_neighbours=True, batch_invariant=True)
def rms_norm_triton(
    x: Tensor, weight: Tensor | None, eps: float, weight_offset: float, scale_in_float32: bool
) -> Tensor:
    """`rms_norm` of rows that may lie apart (columns of a wider product)."""
    width = x.shape[-1]
    if x.is_contiguous() or x.dim() < 3 or x.stride(-1) != 1 or x.shape[:-3].numel() != 1:
        x = x.contiguous()
        num_inner, outer_stride, inner_stride = 1, width, 0
    else:
        num_inner, outer_stride, inner_stride = x.shape[-2], x.stride(-3), x.stride(-2)
    weight = None if weight is None else weight.contiguous()
    out = x.new_empty(x.shape)
    num_rows = x.numel() // width
    grid, tile = _tiles(num_rows, width)
    _rms_norm(
        grid,
        *(x, None, weight, out, None, num_rows, num_inner, outer_stride, inner_stride),
        *(width, eps, weight_offset),
        SCALE_IN_FLOAT32=scale_in_float32,
        **tile,
    )
    return out


def _add_supports(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, weight_offset: float, scale_in_float32: bool
) -> str | None:
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # slow to import, unused by kept graphs

    same = x.dim() == residual.dim() and all(
        statically_known_true(mine == other) for mine, other in zip(x.shape, residual.shape, strict=True)
    )
    return _why_refused(x.shape[-1], x, residual, weight) if same else "x and residual differ in shape"


@add_rms_norm.kernel("triton", _add_supports, fuses_with_neighbours=True, batch_invariant=True)
def add_rms_norm_triton(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, weight_offset: float, scale_in_float32: bool
) -> tuple[Tensor, Tensor]:
    """`add_rms_norm` in one pass: the sum is rounded and written while its norm is taken."""
    x, residual, width = x.contiguous(), residual.contiguous(), x.shape[-1]
    weight = None if weight is None else weight.contiguous()
    out, total = torch.empty_like(x), torch.empty_like(x)
    num_rows = x.numel() // width
    grid, tile = _tiles(num_rows, width)
    _rms_norm(
        grid,
        *(x, residual, weight, out, total, num_rows, 1, width, 0, width, eps, weight_offset),
        SCALE_IN_FLOAT32=scale_in_float32,
        **tile,
    )
    return out, total


def _gated_supports(
    x: Tensor,
    gate: Tensor,
    weight: Tensor,
    eps: float,
    activation: str,
    groups: int,
    gate_first: bool,
    scale_in_float32: bool,
) -> str | None:
    if activation not in ("silu", "sigmoid"):
        return f"activation {activation!r}; there are kernels for silu and sigmoid"
    return _why_refused(x.shape[-1], gate, weight) or why_refused(x, None if x.dtype == torch.float32 else gate)


@gated_rms_norm.kernel("triton", _gated_supports, fuses_with_neighbours=True, batch_invariant=True)
def gated_rms_norm_triton(
    x: Tensor,
    gate: Tensor,
    weight: Tensor,
    eps: float,
    activation: str,
    groups: int,
    gate_first: bool,
    scale_in_float32: bool,
) -> Tensor:
    """`gated_rms_norm` with each group of a row as a row."""
    x, gate, weight = x.contiguous(), gate.contiguous(), weight.contiguous()
    width = x.shape[-1] // groups
    out = torch.empty_like(x)
    num_rows = x.numel() // width
    grid, tile = _tiles(num_rows, width)
    _gated_rms_norm(
        grid,
        *(x, gate, weight, out, num_rows, width, groups, eps),
        IS_SILU=activation == "silu",
        GATE_FIRST=gate_first,
        SCALE_IN_FLOAT32=scale_in_float32,
        **tile,
    )
    return out


def _layer_supports(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> str | None:
    return _why_refused(x.shape[-1], x, weight, bias)


@layer_norm.kernel("triton", _layer_supports, fuses_with_neighbours=True, batch_invariant=True)
def layer_norm_triton(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """`layer_norm` with the variance of centred values."""
    x, width = x.contiguous(), x.shape[-1]
    weight, bias = (None if given is None else given.contiguous() for given in (weight, bias))
    out = torch.empty_like(x)
    num_rows = x.numel() // width
    grid, tile = _tiles(num_rows, width)
    _layer_norm(grid, x, weight, bias, out, num_rows, width, eps, **tile)
    return out
