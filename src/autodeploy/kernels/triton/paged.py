"""What kernels over pages share: tiles of a packed row, a softmax that goes by blocks, and contexts cut into splits.

A tile is up to BLOCK_T new tokens of one sequence. How many tiles a row has depends on values that only the device
knows, so launches have room for as many as there can be, and programs without a tile end at once. Equally, a context
is cut into a number of splits that follows from shapes; how long a split is, each program works out for itself. So a
launch never waits for the device, and a CUDA graph of it fits every batch of its shape.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from autodeploy.kernels.triton.arithmetic import dot
from autodeploy.kernels.triton.float8 import to_dtype, why_no_float8
from autodeploy.kernels.triton.launch import Launcher, num_processors
from autodeploy.ops.attention import is_float8

LOG2_E = tl.constexpr(1.4426950408889634)
"""Softmax is computed with powers of two, which the hardware has."""

_LEAST_KEYS_OF_SPLIT = 128
_MOST_SPLITS = 64


def most_tiles(num_tokens: int, num_sequences: int, block_tokens: int) -> int:
    """Programs that are enough for all tiles of a row, however its sequences lie in it."""
    return num_tokens if block_tokens == 1 else num_tokens // block_tokens + num_sequences


def num_splits(num_programs: int, most_keys: int, device: torch.device) -> int:
    """Parts, a power of two, that each context is cut into so that a device is busy with this many programs."""
    wanted = min(2 * num_processors(device) // num_programs, most_keys // _LEAST_KEYS_OF_SPLIT, _MOST_SPLITS)
    return 1 << max(wanted, 1).bit_length() - 1


def tokens_per_tile(num_tokens: int, num_sequences: int, rows_per_token: int, most_rows: int) -> tuple[int, int]:
    """Rows of a tile, a power of two from 16 on, and how many tokens they hold, for sequences of average length."""
    average = -(-num_tokens // max(num_sequences, 1))
    rows = max(
        16, triton.next_power_of_2(rows_per_token), min(most_rows, triton.next_power_of_2(average * rows_per_token))
    )
    return rows, rows // rows_per_token


def configurations(*choices: tuple[int, int, int]) -> list[Any]:
    """Configurations by keys of a block, warps and stages."""
    return [triton.Config({"BLOCK_K": keys}, num_warps=warps, num_stages=stages) for keys, warps, stages in choices]


@triton.jit
def write_entry(
    x, cache, token, slot, token_stride, head_stride, ENTRY: tl.constexpr, NUM_HEADS: tl.constexpr, DIM: tl.constexpr,
    BLOCK: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """Write a token's heads to a slot of a cache; the sizes are those of `sizes_of_entries`."""
    element = tl.arange(0, BLOCK)
    mask = element < NUM_HEADS * DIM
    entry = tl.load(x + token * token_stride + element // DIM * head_stride + element % DIM, mask=mask)
    tl.store(cache + slot * ENTRY + element, to_dtype(entry, cache.dtype.element_ty, LARGEST), mask=mask)


@triton.jit
def _write_entries(
    x, cache, y, other_cache, slot_mapping, token_stride, head_stride, y_token_stride, y_head_stride,
    ENTRY: tl.constexpr, NUM_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, LARGEST: tl.constexpr,
    Y_ENTRY: tl.constexpr, Y_NUM_HEADS: tl.constexpr, Y_DIM: tl.constexpr, Y_BLOCK: tl.constexpr,
    Y_LARGEST: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_mapping + token).to(tl.int64)
    if tl.program_id(1) == 0:
        write_entry(
            x, cache, token, slot, token_stride, head_stride, ENTRY, NUM_HEADS, DIM, BLOCK, LARGEST
        )  # fmt: skip
    elif y is not None:
        write_entry(
            y, other_cache, token, slot, y_token_stride, y_head_stride, Y_ENTRY, Y_NUM_HEADS, Y_DIM, Y_BLOCK, Y_LARGEST
        )  # fmt: skip


_write = Launcher(_write_entries)


def write_entries(
    x: Tensor, cache: Tensor, slot_mapping: Tensor, y: Tensor | None = None, other_cache: Tensor | None = None
) -> None:
    """Write each token's heads to its slot of one or two caches, in their dtypes; float8 at most its largest number.

    Args:
        x, y: `[1, T, K, D]`, each of its own K and D. slot_mapping: int `[T]`.
        cache, other_cache: `[pages, page_size, K, D]`, gaps between their entries at most.
    """
    x = x if x.stride(3) == 1 else x.contiguous()
    y = y if y is None or y.stride(3) == 1 else y.contiguous()
    strides = (x.stride(1), x.stride(2), *((0, 0) if y is None else (y.stride(1), y.stride(2))))
    others = {f"Y_{name}": size for name, size in sizes_of_entries(y, other_cache).items()}
    count = 1 if y is None else 2
    sizes = sizes_of_entries(x, cache)
    _write((x.shape[1], count), x, cache, y, other_cache, slot_mapping, *strides, **sizes, **others)


def sizes_of_entries(x: Tensor | None, cache: Tensor | None) -> dict[str, Any]:
    """What a kernel is told of the entries of `x` `[1, T, K, D]` in a cache; None for each where there is none."""
    if x is None or cache is None:
        return dict.fromkeys(("ENTRY", "NUM_HEADS", "DIM", "BLOCK", "LARGEST"))
    _, _, num_heads, dim = x.shape
    block, largest = triton.next_power_of_2(num_heads * dim), largest_of(cache)
    return {"ENTRY": cache.stride(1), "NUM_HEADS": num_heads, "DIM": dim, "BLOCK": block, "LARGEST": largest}


def largest_of(cache: Tensor) -> float | None:
    """The largest number of a cache of float8, which larger ones become; None of another dtype."""
    return torch.finfo(cache.dtype).max if is_float8(cache.dtype) else None


def why_not_kept(*caches: Tensor) -> str | None:
    """The reason that entries of float8 cannot be converted on the caches' device, or None."""
    return next((why_no_float8(cache.device) for cache in caches if is_float8(cache.dtype)), None)


@triton.jit
def find_tile(cu_seqlens, num_sequences, tile, BLOCK_T: tl.constexpr):
    """A tile's sequence, its first token, and the end of its sequence; a first token past the end means no tile.

    Sequence i has the tiles from `cu_seqlens[i] // BLOCK_T + i` on: never fewer than it needs, at most one more.
    """
    before = 0
    for start in range(0, num_sequences, 128):
        index = start + tl.arange(0, 128)
        first = tl.load(cu_seqlens + index, mask=index < num_sequences, other=2147483647 - 128)
        if BLOCK_T > 1:
            first = first // BLOCK_T + index
        before += tl.sum(((first <= tile) & (index < num_sequences)).to(tl.int32), 0)
    sequence = before - 1
    begin = tl.load(cu_seqlens + sequence)
    token = begin + (tile - begin // BLOCK_T - sequence) * BLOCK_T if BLOCK_T > 1 else tile
    return sequence, token, tl.load(cu_seqlens + sequence + 1)


@triton.jit
def find_split(first, end, BLOCK_K: tl.constexpr):
    """The keys of this program's split of a context that begins at `first`; splits are the last axis of the grid."""
    split = tl.program_id(2)
    size = tl.cdiv(tl.cdiv(end - first, tl.num_programs(2)), BLOCK_K) * BLOCK_K
    begin = first + split * size
    return begin, tl.minimum(begin + size, end)


@triton.jit
def find_entries(page_table, sequence, page_table_width, positions, is_inside, PAGE_SIZE: tl.constexpr):
    """Where the entries of positions of a sequence are: page · page size + place within the page, int64."""
    pages = tl.load(page_table + sequence * page_table_width + positions // PAGE_SIZE, mask=is_inside, other=0)
    return pages.to(tl.int64) * PAGE_SIZE + positions % PAGE_SIZE


@triton.jit
def softmax_step(mixed, total, top, scores, value):
    """One more block of keys in a softmax that goes by blocks (arXiv 1805.02867, arXiv 2205.14135).

    mixed: values so far, `[M, V]`, weighed relative to the largest score `top` `[M]`; total: sum of the weights `[M]`.
    scores: `[M, K]`, to the base of 2, -inf for what a row does not see. value: `[K, V]`.
    """
    highest = tl.maximum(top, tl.max(scores, 1))
    level = tl.where(highest == float("-inf"), 0.0, highest)
    weights = tl.exp2(scores - level[:, None])
    kept = tl.exp2(top - level)
    mixed = dot(weights.to(value.dtype), value, mixed * kept[:, None])
    return mixed, total * kept + tl.sum(weights, 1), highest


@triton.jit
def store_rows(out, partial, sums, rows, is_row, mixed, total, top, DIM: tl.constexpr, IS_SPLIT: tl.constexpr):
    """Write a tile's rows, or what one split has of them: their mixtures, and the logarithms of their weights."""
    column = tl.arange(0, mixed.shape[1])
    mask = is_row[:, None] & (column < DIM)[None, :]
    has_seen = total > 0
    total = tl.where(has_seen, total, 1.0)
    result = mixed / total[:, None]
    if IS_SPLIT:
        place = rows * tl.num_programs(2) + tl.program_id(2)
        tl.store(partial + place[:, None] * DIM + column[None, :], result, mask=mask)
        tl.store(sums + place, tl.where(has_seen, top + tl.log2(total), float("-inf")), mask=is_row)
    else:
        tl.store(out + rows[:, None] * DIM + column[None, :], result.to(out.dtype.element_ty), mask=mask)


@triton.jit
def _combine(out, partial, sums, DIM: tl.constexpr, BLOCK_V: tl.constexpr, SPLITS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    column = tl.arange(0, BLOCK_V)
    weight = tl.load(sums + row * SPLITS + split)
    weight = tl.exp2(weight - tl.max(weight, 0))
    place = (row * SPLITS + split)[:, None] * DIM + column[None, :]
    parts = tl.load(partial + place, mask=(column < DIM)[None, :], other=0.0)
    result = tl.sum(parts * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(out + row * DIM + column, result.to(out.dtype.element_ty), mask=column < DIM)


_combine_splits = Launcher(_combine)


class Splits:
    """Room for what the splits of each row find, and the kernel that makes one result of it (flash-decoding).

    Args:
        out: `[..., V]`, contiguous; each row gets one result.
    """

    def __init__(self, out: Tensor, count: int) -> None:
        self.out, self.count = out, count
        self.partial = self.sums = out  # not read with one split
        if count > 1:
            num_rows = out.numel() // out.shape[-1]
            self.partial = out.new_empty(num_rows, count, out.shape[-1], dtype=torch.float32)
            self.sums = out.new_empty(num_rows, count, dtype=torch.float32)

    def combine(self) -> None:
        if self.count > 1:
            dim = self.out.shape[-1]
            blocks = {"DIM": dim, "BLOCK_V": triton.next_power_of_2(dim), "SPLITS": self.count}
            _combine_splits((self.sums.shape[0],), self.out, self.partial, self.sums, **blocks)
