"""The token some places back: what time mixing, delayed values and short convolutions look at, and its cached twin."""

import itertools
from typing import Any

import torch
from torch import Tensor

from autodeploy.ops.op import op
from autodeploy.ops.state import SlotState, StateSpec


def _fake(x: Tensor, distance: int, first: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    return torch.empty_like(x)


@op(opaque=True, fake=_fake)
def token_shift(x: Tensor, distance: int, first: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    """`x[t - distance]` within each packed sequence; before its start, `first`.

    Args:
        x: `[1, T, *shape]`.
        distance: tokens to look back, at least 1.
        first: `shape`, what stands before a sequence; None means zeros.
        cu_seqlens: int `[S+1]`; None means the row is one sequence.
    Returns:
        `[1, T, *shape]`.
    """
    output = torch.empty_like(x)
    borders = [0, x.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    before = _before(x, distance, first)
    for start, end in itertools.pairwise(borders):
        output[0, start:end] = torch.cat((before, x[0, start:end]))[: end - start]
    return output


def _before(x: Tensor, distance: int, first: Tensor | None) -> Tensor:
    """The `distance` rows that stand before a sequence."""
    if first is None:
        return x.new_zeros(distance, *x.shape[2:])
    return first.to(x.dtype).expand(distance, *x.shape[2:])


def _cached_fake(
    x: Tensor,
    distance: int,
    first: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_lens: Tensor,
    state_slots: Tensor,
    recent: Tensor,
) -> Tensor:
    return torch.empty_like(x)


@op(opaque=True, fake=_cached_fake, mutates=("recent",), batch_invariant=True)
def cached_token_shift(
    x: Tensor,
    distance: int,
    first: Tensor | None,
    cu_seqlens: Tensor | None,
    seq_lens: Tensor,
    state_slots: Tensor,
    recent: Tensor,
) -> Tensor:
    """`token_shift` of new tokens `[1, T, *shape]`, after `recent` ones `[slots, distance, *shape]`, oldest first."""
    output = torch.empty_like(x)
    borders = [0, x.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    slots, lengths = state_slots.tolist(), seq_lens.tolist()
    for index, (start, end) in enumerate(itertools.pairwise(borders)):
        if end == start:
            continue
        is_new = lengths[index] == end - start
        before = _before(x, distance, first) if is_new else recent[slots[index]]
        rows = torch.cat((before, x[0, start:end]))
        output[0, start:end] = rows[: end - start]
        recent[slots[index]] = rows[-distance:]
    return output


@token_shift.with_states(cached_token_shift)
def _states(x: Tensor, distance: int, **_: Any) -> dict[str, StateSpec]:
    shape = (distance, *x.shape[2:])
    return {"recent": SlotState(name="recent", shape=shape, dtype=x.dtype, shard_dim=None)}


@token_shift.with_samples
def _samples() -> list[dict[str, Any]]:
    borders = torch.tensor([0, 1, 10, 24], dtype=torch.int32)
    plain: dict[str, Any] = {"x": torch.randn(1, 24, 8), "distance": 1, "first": None, "cu_seqlens": borders}
    return [
        plain,
        plain | {"distance": 3},
        plain | {"x": torch.randn(1, 24, 2, 4), "distance": 2, "first": torch.randn(2, 4)},
    ]
