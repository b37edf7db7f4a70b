"""rope: query and key turned in one call, read from the columns of the fused projection where they are."""

from torch import Tensor

from autodeploy.kernels.cpu.native import INT64, POINTER, THREADS, NativeFunction, num_threads, why_refused
from autodeploy.ops.rope import rope

_MIN_ELEMENTS_FOR_THREADS = 1 << 15

_ONE = (POINTER, INT64, INT64, POINTER, INT64)
_rope = NativeFunction("rope", (*_ONE, *_ONE, POINTER, POINTER, INT64, INT64, INT64, THREADS))


def _supports(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> str | None:
    if any(tensor.shape[0] != 1 for tensor in (query, key, cos, sin)):
        return "more than one row of tokens"
    if cos.shape[-1] % 2 or cos.shape[-1] > query.shape[-1] or query.shape[-1] != key.shape[-1]:
        return f"{cos.shape[-1]} rotary dimensions of heads of {query.shape[-1]} and {key.shape[-1]}"
    return why_refused(query, key, cos, sin)


@rope.kernel("cpu", _supports, fuses_with_neighbours=True, batch_invariant=True)
def rope_cpu(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`rope` with each rotated dimension read and written once."""
    if query.stride(-1) != 1 or key.stride(-1) != 1:
        query, key = query.contiguous(), key.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    query_out, key_out = query.new_empty(query.shape), key.new_empty(key.shape)
    _, num_tokens, num_heads, width = query.shape
    _, query_token_stride, query_head_stride, _ = query.stride()
    _, key_token_stride, key_head_stride, _ = key.stride()
    _rope[query.dtype](
        query.data_ptr(),
        query_token_stride,
        query_head_stride,
        query_out.data_ptr(),
        num_heads,
        key.data_ptr(),
        key_token_stride,
        key_head_stride,
        key_out.data_ptr(),
        key.shape[2],
        cos.data_ptr(),
        sin.data_ptr(),
        num_tokens,
        width,
        cos.shape[-1],
        num_threads(query_out.numel(), _MIN_ELEMENTS_FOR_THREADS),
    )
    return query_out, key_out
