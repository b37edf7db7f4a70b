"""Keeping a value of every token for a reader beside the graph, such as a draft head that reads hidden states."""

from typing import Any

import torch
from torch import Tensor

from autodeploy.ops.op import op
from autodeploy.ops.state import PagedState, StateSpec


@op(batch_invariant=True)
def keep_rows(x: Tensor) -> Tensor:
    """`x` itself, `[1, T, H]`; its cached twin remembers every token's row."""
    return x.clone()


@op(mutates=("rows",), batch_invariant=True)
def cached_keep_rows(x: Tensor, slot_mapping: Tensor, rows: Tensor) -> Tensor:
    """`x` itself, `[1, T, H]`, after each token's row was written to `rows`, `[pages, page_size, H]`.

    Args:
        slot_mapping: int64 `[T]`, where each token's row goes: page * page_size + offset within the page.
    """
    rows.view(-1, rows.shape[2]).index_copy_(0, slot_mapping, x[0])
    return x.clone()


@keep_rows.with_states(cached_keep_rows)
def _states(x: Tensor) -> dict[str, StateSpec]:
    return {"rows": PagedState(name="rows", shape=(int(x.shape[2]),), dtype=x.dtype, shard_dim=None)}


@keep_rows.with_samples
def _samples() -> list[dict[str, Any]]:
    return [{"x": torch.randn(1, 24, 8)}]
