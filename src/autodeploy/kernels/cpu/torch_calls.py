"""Operators of torch that a tape repeats natively: what stands between kernels, small and many.

An operator's call and tensors for its results go in; the native calls that compute them are made, and so written down
by whoever watches. Results are those of torch but for the last bits of exponentials, logarithms and sums; choices among
equal elements are the same. What is not translated (other dtypes, more dimensions, other arguments) stays torch's.
"""

import ctypes
import math
import struct
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from autodeploy.kernels.cpu.native import FLOAT, INT, INT64, POINTER, THREADS, NativeFunction, num_threads, pointer

Calls = list[tuple[NativeFunction, torch.dtype | None, tuple[Any, ...]]]
"""Native functions with their arguments but for the number of threads."""
Number = float | int | bool

_KINDS = (torch.float32, torch.bfloat16, torch.int64, torch.int32, torch.bool)
"""As `Kind` in csrc/elementwise.cpp counts them."""
_FLOATS = (torch.float32, torch.bfloat16)

_OPERATIONS = (
    *("copy", "negate", "absolute", "square", "square_root", "reciprocal_root", "reciprocal", "exp", "log", "log1p"),
    *("cos", "sin", "tanh", "floor", "sigmoid", "silu", "relu", "gelu", "gelu_tanh", "softplus", "not", "add"),
    *("multiply", "divide", "power", "maximum", "minimum", "equal", "not_equal", "less", "less_or_equal", "greater"),
    *("greater_or_equal", "where"),
)
"""As `Operation` in csrc/elementwise.cpp counts them."""
_OF_INTEGERS = (
    *("copy", "not", "add", "multiply", "maximum", "minimum"),
    *("equal", "not_equal", "less", "less_or_equal", "greater", "greater_or_equal", "where"),
)

_DIMS = 4
_MAX_EXACT = 1 << 24
"""Whole numbers up to which float32 has them all."""
_MAX_SHORT_ROWS, _SHORT = 4096, 16
"""Rows of fewer than `_SHORT` elements up to which the native loop over rows is worth it."""
_MIN_WORK_FOR_THREADS = 1 << 14

_OPERAND = (POINTER, FLOAT, INT, *[INT64] * _DIMS)
_elementwise = NativeFunction(
    "elementwise", (INT, INT, FLOAT, *[INT64] * _DIMS, *_OPERAND, INT, *_OPERAND, *_OPERAND, *_OPERAND, THREADS)
)
_REDUCE = (INT, POINTER, POINTER, INT64, INT64, THREADS)
_reduce, _widening_reduce = NativeFunction("reduce", _REDUCE), NativeFunction("widening_reduce", _REDUCE)
_largest = NativeFunction("largest", (POINTER, POINTER, POINTER, INT64, INT64, INT64, INT, THREADS))
_take = NativeFunction("take", (POINTER, POINTER, INT, INT, INT64, POINTER, *[INT64] * 4, THREADS), INT)
_scatter = NativeFunction("scatter", (POINTER, POINTER, POINTER, FLOAT, POINTER, *[INT64] * 3, THREADS), INT)


def compute_natively(func: Any, args: Sequence[Any], kwargs: dict[str, Any], results: Sequence[Tensor]) -> bool:
    """Put into `results` what an operator of torch gives for these arguments, by native calls.

    Args:
        results: tensors of the results' shapes, dtypes and strides, which nothing else uses.
    Returns:
        False if the call is not translated; then nothing was done.
    Raises:
        IndexError: an index is outside what it indexes.
    """
    translate = _TRANSLATIONS.get(str(func))
    if translate is None:
        return False
    calls = translate(results, *args, **kwargs)
    if calls is None:
        return False
    threads = num_threads(sum(result.numel() for result in results), _MIN_WORK_FOR_THREADS)
    for function, dtype, arguments in calls:
        if function[dtype](*arguments, threads):
            raise IndexError(f"{func}: an index is outside what it indexes")
    return True


def _operands(out: Tensor, operation: str, *operands: Tensor | Number, alpha: Number = 1) -> Calls | None:
    """One elementwise operation into `out`, of operands that are repeated along dimensions that they lack."""
    tensors = [out, *(operand for operand in operands if isinstance(operand, Tensor))]
    if any(tensor.dtype not in _KINDS or tensor.device.type != "cpu" for tensor in tensors):
        return None
    numbers = [float(number) for number in (alpha, *operands) if not isinstance(number, Tensor)]
    integers = not any(tensor.dtype in _FLOATS for tensor in tensors)
    if integers and (operation not in _OF_INTEGERS or any(not _is_exact(number) for number in numbers)):
        return None
    if not integers and out.dtype in (torch.int64, torch.int32):
        return None
    if out.numel() == 0:
        return []
    laid = [tensor.expand(out.shape) for tensor in tensors]
    layout = _layout(out.shape, [tensor.stride() for tensor in laid])
    if layout is None:
        return None
    sizes, strides = layout
    given = iter(zip(tensors, strides, strict=True))
    described: list[Any] = []
    for operand in (out, *operands, *[0.0] * (3 - len(operands))):
        if isinstance(operand, Tensor):
            tensor, steps = next(given)
            described += [tensor.data_ptr(), 0.0, _KINDS.index(tensor.dtype), *steps]
        else:
            described += [None, ctypes.c_float(operand).value, 0, *[0] * _DIMS]
    width = len(_OPERAND)
    arguments = (_OPERATIONS.index(operation), integers, ctypes.c_float(alpha).value, *sizes, *described[:width])
    return [(_elementwise, None, (*arguments, len(operands), *described[width:]))]


def _is_exact(number: float) -> bool:
    return number == int(number) and abs(number) <= _MAX_EXACT if math.isfinite(number) else False


def _layout(shape: Sequence[int], strides: Sequence[Sequence[int]]) -> tuple[list[int], list[list[int]]] | None:
    """Sizes and each tensor's strides over `_DIMS` dimensions, or None if they are too many or rows too short."""
    sizes: list[int] = []
    steps: list[list[int]] = [[] for _ in strides]
    for dim, size in enumerate(shape):
        if size == 1:
            continue
        here = [stride[dim] for stride in strides]
        if sizes and all(step[-1] == stride * size for step, stride in zip(steps, here, strict=True)):
            sizes[-1] *= size
            for step, stride in zip(steps, here, strict=True):
                step[-1] = stride
        else:
            sizes.append(size)
            for step, stride in zip(steps, here, strict=True):
                step.append(stride)
    missing = _DIMS - len(sizes)
    if missing < 0:
        return None
    sizes = [1] * missing + sizes
    if sizes[-1] < _SHORT and math.prod(sizes[:-1]) > _MAX_SHORT_ROWS:
        return None
    return sizes, [[0] * missing + step for step in steps]


Translation = Callable[..., Calls | None]
Results = Sequence[Tensor]


def _unary(operation: str) -> Translation:
    return lambda results, x: _operands(results[0], operation, x)


def _binary(operation: str) -> Translation:
    return lambda results, x, other: _operands(results[0], operation, x, other)


def _comparison(operation: str) -> Translation:
    return lambda results, x, other: _operands(results[0], operation, x, _rounded(other, x.dtype))


def _rounded(number: Tensor | Number, dtype: torch.dtype) -> Tensor | Number:
    """A number as torch adds it to, or compares it with, tensors of a dtype; tensors as they are."""
    if isinstance(number, Tensor) or dtype != torch.bfloat16 or not math.isfinite(number):
        return number
    (bits,) = struct.unpack("<I", ctypes.c_float(number))
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16
    return float(struct.unpack("<f", struct.pack("<I", rounded << 16))[0])


def _copy(results: Results, x: Tensor, *_: Any, **__: Any) -> Calls | None:
    """Whatever converts: the result's dtype and strides say into what."""
    return _operands(results[0], "copy", x)


def _reshaped(results: Results, x: Tensor, *_: Any) -> Calls | None:
    return _operands(results[0].view(x.shape), "copy", x)


def _filled(value: Number) -> Translation:
    return lambda results, *_, **__: _operands(results[0], "copy", value)


def _full(results: Results, _: Any, value: Number, **__: Any) -> Calls | None:
    return _operands(results[0], "copy", value)


def _add(results: Results, x: Tensor, other: Tensor | Number, alpha: Number = 1) -> Calls | None:
    return _operands(results[0], "add", x, _rounded(other, results[0].dtype), alpha=alpha)


def _sub(results: Results, x: Tensor, other: Tensor | Number, alpha: Number = 1) -> Calls | None:
    return _operands(results[0], "add", x, _rounded(other, results[0].dtype), alpha=-alpha)


def _rsub(results: Results, x: Tensor, other: Tensor | Number, alpha: Number = 1) -> Calls | None:
    return _operands(results[0], "add", _rounded(other, results[0].dtype), x, alpha=-alpha)


def _power(results: Results, x: Tensor, exponent: Number) -> Calls | None:
    if exponent == 2:
        return _operands(results[0], "square", x)
    return _operands(results[0], "power", x, alpha=exponent)


def _clamp(results: Results, x: Tensor, least: Number | None = None, most: Number | None = None) -> Calls | None:
    if least is None:
        return None if most is None else _operands(results[0], "minimum", x, most)
    first = _operands(results[0], "maximum", x, least)
    if most is None or first is None:
        return first
    second = _operands(results[0], "minimum", results[0], most)
    return None if second is None else first + second


def _gelu(results: Results, x: Tensor, approximate: str = "none") -> Calls | None:
    return _operands(results[0], "gelu" if approximate == "none" else "gelu_tanh", x)


def _softplus(results: Results, x: Tensor, beta: Number = 1, threshold: Number = 20) -> Calls | None:
    return _operands(results[0], "softplus", x) if (beta, threshold) == (1, 20) else None


def _where(results: Results, condition: Tensor, x: Tensor | Number, other: Tensor | Number) -> Calls | None:
    return _operands(results[0], "where", condition, x, other)


def _masked_fill(results: Results, x: Tensor, mask: Tensor, value: Number) -> Calls | None:
    return _operands(results[0], "where", mask, value, x)


def _not(results: Results, x: Tensor) -> Calls | None:
    return _operands(results[0], "not", x) if x.dtype == torch.bool else None


def _cat(results: Results, tensors: Sequence[Tensor], dim: int = 0) -> Calls | None:
    calls: Calls = []
    at = 0
    for tensor in tensors:
        if tensor.dim() != results[0].dim():  # torch leaves out what is empty
            return None
        size = tensor.shape[dim]
        part = _operands(results[0].narrow(dim, at, size), "copy", tensor)
        if part is None:
            return None
        calls, at = calls + part, at + size
    return calls


def _stack(results: Results, tensors: Sequence[Tensor], dim: int = 0) -> Calls | None:
    dim %= results[0].dim()
    return _cat(results, [tensor.unsqueeze(dim) for tensor in tensors], dim)


def _slice_scatter(
    results: Results,
    x: Tensor,
    source: Tensor,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Calls | None:
    first = _operands(results[0], "copy", x)
    second = _operands(torch.ops.aten.slice(results[0], dim, start, end, step), "copy", source)
    return None if first is None or second is None else first + second


def _repeated(results: Results, x: Tensor, repeats: int, dim: int | None = None, **_: Any) -> Calls | None:
    if dim is None:
        return None
    dim %= x.dim()
    return _operands(results[0].unflatten(dim, (x.shape[dim], repeats)), "copy", x.unsqueeze(dim + 1))


def _over_rows(reduction: int) -> Translation:
    """A sum or mean over the last dimensions."""

    def translate(
        results: Results, x: Tensor, dims: Sequence[int] | int | None, keepdim: bool = False, *, dtype: Any = None
    ) -> Calls | None:
        dims = [dims] if isinstance(dims, int) else dims or range(x.dim())
        count = len(dims)
        if sorted(dim % x.dim() for dim in dims) != list(range(x.dim() - count, x.dim())):
            return None
        return _reduced(reduction, results[0], x, x.shape[x.dim() - count :].numel())

    return translate


def _softmax(results: Results, x: Tensor, dim: int, dtype: Any = None) -> Calls | None:
    return _reduced(2, results[0], x, x.shape[-1]) if dim % x.dim() == x.dim() - 1 else None


def _reduced(reduction: int, out: Tensor, x: Tensor, width: int) -> Calls | None:
    if x.dtype not in _FLOATS or out.dtype not in _FLOATS or not (x.is_contiguous() and out.is_contiguous()):
        return None
    if width == 0 or (x.dtype, out.dtype) == (torch.float32, torch.bfloat16):
        return None
    function = _reduce if x.dtype == out.dtype else _widening_reduce
    return [(function, x.dtype, (reduction, x.data_ptr(), out.data_ptr(), x.numel() // width, width))]


def _topk(
    results: Results, x: Tensor, k: int, dim: int = -1, largest: bool = True, is_sorted: bool = True
) -> Calls | None:
    is_plain = x.dim() > 0 and dim % x.dim() == x.dim() - 1 and largest and 0 < k <= x.shape[-1]
    if not is_plain or x.dtype not in _FLOATS or not _are_contiguous(x, *results):
        return None
    sizes = (x.numel() // x.shape[-1], x.shape[-1], k, is_sorted)
    return [(_largest, x.dtype, (x.data_ptr(), results[0].data_ptr(), results[1].data_ptr(), *sizes))]


def _embedding(results: Results, weight: Tensor, indices: Tensor, *_: Any, **__: Any) -> Calls | None:
    return _taken(results[0], weight, 0, indices)


def _index_select(results: Results, x: Tensor, dim: int, indices: Tensor) -> Calls | None:
    return _taken(results[0], x, dim % x.dim(), indices) if x.dim() else None


def _index(results: Results, x: Tensor, indices: Sequence[Tensor | None]) -> Calls | None:
    given = [(dim, index) for dim, index in enumerate(indices) if index is not None]
    return _taken(results[0], x, *given[0], from_end=True) if len(given) == 1 else None


def _taken(out: Tensor, x: Tensor, dim: int, indices: Tensor, *, from_end: bool = False) -> Calls | None:
    if indices.dtype not in (torch.int64, torch.int32) or not _are_contiguous(out, x, indices):
        return None
    size = x.shape[dim + 1 :].numel() * x.element_size()
    sizes = (x.shape[:dim].numel(), x.shape[dim], indices.numel(), size)
    is_int64 = indices.dtype == torch.int64
    return [(_take, None, (x.data_ptr(), indices.data_ptr(), is_int64, from_end, 0, out.data_ptr(), *sizes))]


def _gather(results: Results, x: Tensor, dim: int, indices: Tensor, **_: Any) -> Calls | None:
    if not _are_rows(x, dim, indices) or not _are_contiguous(results[0], x, indices):
        return None
    sizes = (x.shape[:-1].numel(), x.shape[-1], indices.shape[-1], x.element_size())
    given = (x.data_ptr(), indices.data_ptr(), True, False, indices.shape[-1], results[0].data_ptr())
    return [(_take, None, (*given, *sizes))]


def _scattered(results: Results, x: Tensor, dim: int, indices: Tensor, source: Tensor | Number) -> Calls | None:
    values = source if isinstance(source, Tensor) else None
    if values is not None and (values.dtype != x.dtype or values.shape != indices.shape):
        return None
    if x.dtype not in _FLOATS or not _are_rows(x, dim, indices):
        return None
    if not _are_contiguous(results[0], x, indices, *([] if values is None else [values])):
        return None
    given = (x.data_ptr(), indices.data_ptr(), pointer(values), 0.0 if values is not None else float(source))
    sizes = (x.shape[:-1].numel(), x.shape[-1], indices.shape[-1])
    return [(_scatter, x.dtype, (*given, results[0].data_ptr(), *sizes))]


def _are_rows(x: Tensor, dim: int, indices: Tensor) -> bool:
    """Whether indices are numbers in the rows of `x`, of all rows."""
    return (
        x.dim() > 0
        and dim % x.dim() == x.dim() - 1
        and indices.shape[:-1] == x.shape[:-1]
        and indices.dtype == torch.int64
    )


def _are_contiguous(*tensors: Tensor) -> bool:
    return all(tensor.is_contiguous() and tensor.device.type == "cpu" for tensor in tensors)


_SUM, _MEAN = 0, 1
_COMPARISONS = {
    **{"eq": "equal", "ne": "not_equal", "lt": "less"},
    **{"le": "less_or_equal", "gt": "greater", "ge": "greater_or_equal"},
}
_TRANSLATIONS: dict[str, Translation] = {
    "aten." + name: translation
    for names, translation in (
        ("to.dtype to.device to.dtype_layout to.other _to_copy.default clone.default contiguous.default", _copy),
        ("type_as.default expand_copy.default lift_fresh_copy.default", _copy),
        ("reshape.default flatten.using_ints _reshape_copy.default", _reshaped),
        ("copy.default", lambda results, x, source, *_: _operands(results[0], "copy", source)),
        ("zeros_like.default new_zeros.default zeros.default", _filled(0)),
        ("ones_like.default new_ones.default ones.default", _filled(1)),
        ("full_like.default full.default", _full),
        ("neg.default", _unary("negate")),
        ("abs.default", _unary("absolute")),
        ("square.default", _unary("square")),
        ("sqrt.default", _unary("square_root")),
        ("rsqrt.default", _unary("reciprocal_root")),
        ("reciprocal.default", _unary("reciprocal")),
        ("exp.default", _unary("exp")),
        ("log.default", _unary("log")),
        ("log1p.default", _unary("log1p")),
        ("cos.default", _unary("cos")),
        ("sin.default", _unary("sin")),
        ("tanh.default", _unary("tanh")),
        ("floor.default", _unary("floor")),
        ("sigmoid.default", _unary("sigmoid")),
        ("silu.default", _unary("silu")),
        ("relu.default", _unary("relu")),
        ("gelu.default", _gelu),
        ("softplus.default", _softplus),
        ("bitwise_not.default logical_not.default", _not),
        ("add.Tensor add.Scalar", _add),
        ("sub.Tensor sub.Scalar", _sub),
        ("rsub.Tensor rsub.Scalar", _rsub),
        ("mul.Tensor mul.Scalar", _binary("multiply")),
        ("div.Tensor div.Scalar", _binary("divide")),
        ("maximum.default", _binary("maximum")),
        ("minimum.default", _binary("minimum")),
        ("pow.Tensor_Scalar", _power),
        ("clamp.default", _clamp),
        ("clamp_min.default", _binary("maximum")),
        ("clamp_max.default", _binary("minimum")),
        ("where.self where.ScalarSelf where.ScalarOther where.Scalar", _where),
        ("masked_fill.Scalar", _masked_fill),
        ("cat.default concat.default concatenate.default", _cat),
        ("stack.default", _stack),
        ("slice_scatter.default", _slice_scatter),
        ("repeat_interleave.self_int", _repeated),
        ("sum.dim_IntList", _over_rows(_SUM)),
        ("mean.dim", _over_rows(_MEAN)),
        ("softmax.int _softmax.default", _softmax),
        ("topk.default", _topk),
        ("embedding.default", _embedding),
        ("index_select.default", _index_select),
        ("index.Tensor", _index),
        ("gather.default", _gather),
        ("scatter.value scatter.src", _scattered),
    )
    for name in names.split()
} | {
    f"aten.{name}.{overload}": _comparison(operation)
    for name, operation in _COMPARISONS.items()
    for overload in ("Tensor", "Scalar")
}
"""By operator; each gives the calls that fill its results, or None."""
