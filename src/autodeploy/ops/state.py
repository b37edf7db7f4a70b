"""State specs: what a cached op remembers between steps, said once and allocated for it by the runtime.

Two kinds cover the mixers in use: `PagedState` grows with the sequence (keys, values, latents) and lives in pages;
`SlotState` has one fixed size per sequence (recurrent states, convolution windows) and lives in slots. A model may mix
them freely. Specs with the same `group` share one page table (or one slot number), so that the allocator works by
geometry and never by op name.
"""

import math
from dataclasses import dataclass

import torch

SLOT_GROUP = "slots"


@dataclass(frozen=True, kw_only=True)
class PagedState:
    """Per-token state kept in pages: a tensor `[num_pages, page_size, *shape]`.

    Attributes:
        name: unique within a program, e.g. `layers_0_self_attn_key_cache`; the graph input that carries the tensor has
            the same name.
        shape: shape of one token's entry, e.g. `(num_kv_heads, head_dim)`.
        dtype: dtype of the stored entries.
        window: tokens a query can look back on, itself included (sliding window); None means all. Pages that lie
            wholly before the window of every future query may be freed and reused.
        shard_dim: dimension of `shape` that tensor parallelism splits, or None when every rank keeps all of it.
        may_be_rounded: the op converts what it writes and reads, so that entries may be stored in another dtype.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    window: int | None = None
    shard_dim: int | None = 0
    may_be_rounded: bool = False

    @property
    def group(self) -> str:
        """Specs of one group share a page table: `full`, or `window_<tokens>`."""
        return "full" if self.window is None else f"window_{self.window}"

    @property
    def bytes_per_token(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True, kw_only=True)
class SlotState:
    """Fixed-size state per sequence: a tensor `[num_slots, *shape]`, zero when a sequence starts.

    Attributes:
        name: unique within a program; also the name of the graph input that carries the tensor.
        shape: shape of one sequence's state.
        dtype: dtype of the stored state.
        shard_dim: dimension of `shape` that tensor parallelism splits, or None.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    shard_dim: int | None = 0

    @property
    def group(self) -> str:
        return SLOT_GROUP

    @property
    def bytes_per_slot(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


StateSpec = PagedState | SlotState
