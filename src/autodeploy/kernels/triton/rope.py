"""rope: query and key turned in one launch, read from the columns of the fused projection where they are."""

import triton
import triton.language as tl
from torch import Tensor

from autodeploy.kernels.triton.float8 import to_dtype
from autodeploy.kernels.triton.launch import Launcher, why_refused
from autodeploy.ops.rope import rope

_TILE = 1024
"""Elements that a program takes."""


@triton.jit
def turn_heads(
    x,
    out,
    cos,
    sin,
    token,
    row,
    first_head,
    num_heads,
    token_stride,
    head_stride,
    WIDTH: tl.constexpr,
    ROTARY: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
    LARGEST: tl.constexpr,
):
    """Turn a block of a token's heads into a row of `out`, whose heads lie side by side; LARGEST as in `to_dtype`."""
    heads = first_head + tl.arange(0, HEADS)
    columns = tl.arange(0, HALF)
    inside = (heads < num_heads)[:, None] & (columns < ROTARY // 2)[None, :]
    source = x + token * token_stride + heads[:, None] * head_stride
    target = out + (row * num_heads + heads[:, None]) * WIDTH
    dtype: tl.constexpr = x.dtype.element_ty
    kept: tl.constexpr = out.dtype.element_ty
    first = tl.load(source + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    second = tl.load(source + ROTARY // 2 + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    angles = token * ROTARY + columns
    of_half = columns < ROTARY // 2
    first_cos = tl.load(cos + angles, mask=of_half, other=0.0).to(tl.float32)[None, :]
    first_sin = tl.load(sin + angles, mask=of_half, other=0.0).to(tl.float32)[None, :]
    second_cos = tl.load(cos + ROTARY // 2 + angles, mask=of_half, other=0.0).to(tl.float32)[None, :]
    second_sin = tl.load(sin + ROTARY // 2 + angles, mask=of_half, other=0.0).to(tl.float32)[None, :]
    turned = (first * first_cos - second * first_sin).to(dtype)
    tl.store(target + columns[None, :], to_dtype(turned, kept, LARGEST), mask=inside)
    turned = (second * second_cos + first * second_sin).to(dtype)
    tl.store(target + ROTARY // 2 + columns[None, :], to_dtype(turned, kept, LARGEST), mask=inside)
    if ROTARY < WIDTH:
        rest = ROTARY + tl.arange(0, REST)
        inside = (heads < num_heads)[:, None] & (rest < WIDTH)[None, :]
        same = tl.load(source + rest[None, :], mask=inside, other=0.0)
        tl.store(target + rest[None, :], to_dtype(same, kept, LARGEST), mask=inside)


@triton.jit
def _rope_heads(
    query,
    key,
    query_out,
    key_out,
    cos,
    sin,
    num_query_heads,
    num_key_heads,
    query_token_stride,
    query_head_stride,
    key_token_stride,
    key_head_stride,
    WIDTH: tl.constexpr,
    ROTARY: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS
    first_key = tl.cdiv(num_query_heads, HEADS) * HEADS
    if head < first_key:
        turn_heads(
            *(query, query_out, cos, sin, token, token, head, num_query_heads, query_token_stride, query_head_stride),
            *(WIDTH, ROTARY, HEADS, HALF, REST, None),
        )
    else:
        turn_heads(
            *(key, key_out, cos, sin, token, token, head - first_key, num_key_heads, key_token_stride, key_head_stride),
            *(WIDTH, ROTARY, HEADS, HALF, REST, None),
        )


_rope = Launcher(_rope_heads)


def _supports(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> str | None:
    if any(tensor.shape[0] != 1 for tensor in (query, key, cos, sin)):
        return "more than one row of tokens"
    if cos.shape[-1] % 2 or cos.shape[-1] > query.shape[-1] or query.shape[-1] != key.shape[-1]:
        return f"{cos.shape[-1]} rotary dimensions of heads of {query.shape[-1]} and {key.shape[-1]}"
    return why_refused(query, key, cos, sin)


@rope.kernel("triton", _supports, fuses_with_neighbours=True, batch_invariant=True)
def rope_triton(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """`rope` with each dimension read and written once."""
    if query.stride(-1) != 1 or key.stride(-1) != 1:
        query, key = query.contiguous(), key.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    query_out, key_out = query.new_empty(query.shape), key.new_empty(key.shape)
    heads = query.shape[2], key.shape[2]
    blocks = blocks_of_heads(query, cos)
    _rope(
        (query.shape[1], sum(triton.cdiv(count, blocks["HEADS"]) for count in heads)),
        *(query, key, query_out, key_out, cos, sin, *heads),
        *(query.stride(1), query.stride(2), key.stride(1), key.stride(2)),
        **blocks,
    )
    return query_out, key_out


def blocks_of_heads(query: Tensor, cos: Tensor) -> dict[str, int]:
    """How many heads of a token a program turns, and the sizes of these for `turn_heads`."""
    num_heads, width = query.shape[2:]
    rotary = cos.shape[-1]
    return {
        "WIDTH": width,
        "ROTARY": rotary,
        "HEADS": max(1, min(triton.next_power_of_2(num_heads), _TILE // triton.next_power_of_2(width))),
        "HALF": triton.next_power_of_2(rotary // 2),
        "REST": triton.next_power_of_2(max(1, width - rotary)),
    }
