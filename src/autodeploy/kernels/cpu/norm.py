"""rms_norm, add_rms_norm, gated_rms_norm and layer_norm: one call each."""

import torch
from torch import Tensor

from autodeploy.kernels.cpu.native import (
    FLOAT,
    INT,
    INT64,
    POINTER,
    THREADS,
    NativeFunction,
    num_threads,
    pointer,
    why_refused,
)
from autodeploy.ops.norm import add_rms_norm, gated_rms_norm, layer_norm, rms_norm

_MIN_ELEMENTS_FOR_THREADS = 1 << 15

_SIGNATURE = (POINTER, INT64, INT64, *[POINTER] * 4, INT64, INT64, INT64, FLOAT, FLOAT, INT, THREADS)
_rms_norm = NativeFunction("rms_norm", _SIGNATURE)
_GATED_SIGNATURE = (POINTER, POINTER, INT64, POINTER, POINTER, INT64, INT64, INT64, FLOAT, INT, INT, INT, THREADS)
_gated_rms_norm = NativeFunction("gated_rms_norm", _GATED_SIGNATURE)
_gated_rms_norm_of_float32 = NativeFunction("gated_rms_norm_of_float32", _GATED_SIGNATURE)  # beside another dtype
_layer_norm = NativeFunction("layer_norm", (*[POINTER] * 4, INT64, INT64, FLOAT, THREADS))


def _supports(x: Tensor, weight: Tensor | None, eps: float, weight_offset: float, scale_in_float32: bool) -> str | None:
    return why_refused(x, weight)


def _add_supports(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, weight_offset: float, scale_in_float32: bool
) -> str | None:
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # slow to import, unused by kept graphs

    same = x.dim() == residual.dim() and all(
        statically_known_true(mine == other) for mine, other in zip(x.shape, residual.shape, strict=True)
    )
    return why_refused(x, residual, weight) if same else "x and residual differ in shape"


@rms_norm.kernel("cpu", _supports, fuses_with_neighbours=True, batch_invariant=True)
def rms_norm_cpu(x: Tensor, weight: Tensor | None, eps: float, weight_offset: float, scale_in_float32: bool) -> Tensor:
    """`rms_norm` in one pass over rows, which may lie apart (columns of a wider product)."""
    width = x.shape[-1]
    if x.is_contiguous() or x.dim() < 3 or x.stride(-1) != 1 or x.shape[:-3].numel() != 1:
        x = x.contiguous()
        num_outer, num_inner, outer_stride, inner_stride = 1, x.numel() // (width or 1), 0, width
    else:
        num_outer, num_inner = x.shape[-3:-1]
        outer_stride, inner_stride = x.stride()[-3:-1]
    weight = None if weight is None else weight.contiguous()
    out = x.new_empty(x.shape)
    _rms_norm[x.dtype](
        x.data_ptr(),
        outer_stride,
        inner_stride,
        None,
        None,
        pointer(weight),
        out.data_ptr(),
        num_outer,
        num_inner,
        width,
        eps,
        weight_offset,
        scale_in_float32,
        num_threads(out.numel(), _MIN_ELEMENTS_FOR_THREADS),
    )
    return out


@add_rms_norm.kernel("cpu", _add_supports, fuses_with_neighbours=True, batch_invariant=True)
def add_rms_norm_cpu(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, weight_offset: float, scale_in_float32: bool
) -> tuple[Tensor, Tensor]:
    """`add_rms_norm` in one pass: the sum is written once and read back from cache."""
    x, residual = x.contiguous(), residual.contiguous()
    weight = None if weight is None else weight.contiguous()
    width = x.shape[-1]
    out, total = torch.empty_like(x), torch.empty_like(x)
    _rms_norm[x.dtype](
        x.data_ptr(),
        0,
        width,
        residual.data_ptr(),
        total.data_ptr(),
        pointer(weight),
        out.data_ptr(),
        1,
        x.numel() // (width or 1),
        width,
        eps,
        weight_offset,
        scale_in_float32,
        num_threads(x.numel(), _MIN_ELEMENTS_FOR_THREADS),
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
    return why_refused(gate, weight) or why_refused(x, None if x.dtype == torch.float32 else gate)


@gated_rms_norm.kernel("cpu", _gated_supports, fuses_with_neighbours=True, batch_invariant=True)
def gated_rms_norm_cpu(
    x: Tensor,
    gate: Tensor,
    weight: Tensor,
    eps: float,
    activation: str,
    groups: int,
    gate_first: bool,
    scale_in_float32: bool,
) -> Tensor:
    """`gated_rms_norm` in two passes over rows in cache; the gate's may lie apart (columns of a wider product)."""
    x, weight, width = x.contiguous(), weight.contiguous(), x.shape[-1]
    if gate.stride(-1) != 1 or gate.shape[:-2].numel() != 1:
        gate = gate.contiguous()
    gate_stride = gate.stride(-2) if gate.dim() > 1 else width
    out = torch.empty_like(x)
    function = _gated_rms_norm if x.dtype == gate.dtype else _gated_rms_norm_of_float32
    function[gate.dtype](
        *(x.data_ptr(), gate.data_ptr(), gate_stride, weight.data_ptr(), out.data_ptr()),
        *(x.numel() // (width or 1), groups, width // groups, eps, activation == "silu"),
        *(gate_first, scale_in_float32, num_threads(x.numel(), _MIN_ELEMENTS_FOR_THREADS)),
    )
    return out


def _layer_supports(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> str | None:
    return why_refused(x, weight, bias)


@layer_norm.kernel("cpu", _layer_supports, fuses_with_neighbours=True)
def layer_norm_cpu(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """`layer_norm` in passes over rows in cache."""
    x, width = x.contiguous(), x.shape[-1]
    weight, bias = (None if given is None else given.contiguous() for given in (weight, bias))
    out = torch.empty_like(x)
    _layer_norm[x.dtype](
        *(x.data_ptr(), pointer(weight), pointer(bias), out.data_ptr()),
        *(x.numel() // (width or 1), width, eps, num_threads(x.numel(), _MIN_ELEMENTS_FOR_THREADS)),
    )
    return out
