"""A made-up recurrent token mixer with one slot state, as a user would add it: h_t = decay * h_(t-1) + x_t."""

import itertools
from typing import Any

import torch
from torch import Tensor

from autodeploy.ops.op import op
from autodeploy.ops.state import SlotState, StateSpec


def _scan(x: Tensor, decay: Tensor, start: Tensor) -> tuple[Tensor, Tensor]:
    outputs = []
    for token in x:
        start = decay * start + token
        outputs.append(start)
    return torch.stack(outputs), start


def _fake(x: Tensor, decay: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    return torch.empty_like(x)


@op(opaque=True, fake=_fake)
def decaying_sum(x: Tensor, decay: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """x: `[1, T, D]`, decay: `[D]`; result `[1, T, D]`. Without boundaries the row is one sequence."""
    borders = [0, x.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    zero = torch.zeros_like(x[0, 0])
    parts = [_scan(x[0, a:b], decay, zero)[0] for a, b in itertools.pairwise(borders) if b > a]
    return torch.cat(parts)[None]


def _cached_fake(
    x: Tensor, decay: Tensor, cu_seqlens: Tensor | None, seq_lens: Tensor, state_slots: Tensor, sums: Tensor
) -> Tensor:
    return torch.empty_like(x)


@op(opaque=True, fake=_cached_fake, mutates=("sums",))
def cached_decaying_sum(
    x: Tensor, decay: Tensor, cu_seqlens: Tensor | None, seq_lens: Tensor, state_slots: Tensor, sums: Tensor
) -> Tensor:
    """`decaying_sum` of new tokens `[1, T, D]`, continued from `sums` `[slots, D]`."""
    assert cu_seqlens is not None
    borders, slots, output = cu_seqlens.tolist(), state_slots.tolist(), torch.empty_like(x)
    for slot, a, b in zip(slots, borders[:-1], borders[1:], strict=True):
        if b > a:
            output[0, a:b], sums[slot] = _scan(x[0, a:b], decay, sums[slot].clone())
    return output


@decaying_sum.with_states(cached_decaying_sum)
def _states(x: Tensor, **_: Any) -> dict[str, StateSpec]:
    return {"sums": SlotState(name="sums", shape=(x.shape[-1],), dtype=x.dtype)}


@decaying_sum.with_samples
def _samples() -> list[dict[str, Any]]:
    borders = torch.tensor([0, 1, 10, 24], dtype=torch.int32)
    return [{"x": torch.randn(1, 24, 8), "decay": torch.rand(8), "cu_seqlens": borders}]
