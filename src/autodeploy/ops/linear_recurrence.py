"""A gated linear recurrence per channel (RG-LRU and its kin), whole and over slot states.

Shapes: T tokens in the packed row, D channels.
"""

from typing import Any

import torch
from torch import Tensor

from autodeploy.ops.op import op
from autodeploy.ops.packed import continue_sequences, over_sequences
from autodeploy.ops.state import SlotState, StateSpec

_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


CHUNK = 64
"""tokens that are summed up by doubling"""


def _recur(state: Tensor, x: Tensor, gate: Tensor) -> tuple[Tensor, Tensor]:
    """state: `[S, D]`, x and gate: `[S, L, D]`."""
    state, outputs = state.float(), []
    for start in range(0, x.shape[1], CHUNK):
        sums = _chunk(state, x[:, start : start + CHUNK].float(), gate[:, start : start + CHUNK].float())
        state = sums[:, -1]
        outputs.append(sums)
    return torch.cat(outputs, dim=1).to(x.dtype), state


def _chunk(state: Tensor, sums: Tensor, kept: Tensor) -> Tensor:
    """Doubling: after step k every token has seen 2^k tokens before it."""
    distance = 1
    while distance < sums.shape[1]:
        earlier = torch.nn.functional.pad(sums, (0, 0, distance, 0))[:, :-distance]
        fading = torch.nn.functional.pad(kept, (0, 0, distance, 0), value=1.0)[:, :-distance]
        sums, kept, distance = sums + kept * earlier, kept * fading, 2 * distance
    return sums + kept * state.unsqueeze(1)


@op(tolerance=_TOLERANCE, opaque=True, fake=lambda x, *_: x.new_empty(x.shape))
def linear_recurrence(x: Tensor, gate: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """h_t = gate_t · h_(t-1) + x_t per channel, in float32 (arXiv 2402.19427). x, gate and the result: `[1, T, D]`."""
    return over_sequences(_recur, [x, gate], cu_seqlens, x.shape[2:])


@op(tolerance=_TOLERANCE, opaque=True, mutates=("state",), fake=lambda x, *_: x.new_empty(x.shape))
def cached_linear_recurrence(
    x: Tensor, gate: Tensor, cu_seqlens: Tensor | None, state_slots: Tensor, state: Tensor
) -> Tensor:
    """`linear_recurrence` of new tokens `[1, T, D]`, continued from `state` `[slots, D]`."""
    return continue_sequences(_recur, [x, gate], cu_seqlens, state, state_slots)


@linear_recurrence.with_states(cached_linear_recurrence)
def _states(x: Tensor, **_: Any) -> dict[str, StateSpec]:
    return {"state": SlotState(name="state", shape=(x.shape[2],), dtype=torch.float32)}


@linear_recurrence.with_samples
def _samples() -> list[dict[str, Any]]:
    boundaries = torch.tensor([0, 1, 10, 24], dtype=torch.int32)
    gate = torch.rand(1, 24, 8)
    gate[:, ::5] = 0.0  # a gate that forgets everything
    return [{"x": torch.randn(1, 24, 8), "gate": gate, "cu_seqlens": boundaries}]
