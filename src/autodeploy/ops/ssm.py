"""Selective state-space recurrences over packed sequences, and their twins over slot states.

`selective_scan` has one decay per channel and state entry, `ssd` one per head, which makes whole chunks matrix
products. States and decays are computed in float32. Shapes: T tokens in the packed row, N state entries; I channels of
a selective scan; H heads of P channels and G groups (H a multiple of G) of a structured one.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autodeploy.ops.op import op
from autodeploy.ops.packed import continue_sequences, over_sequences
from autodeploy.ops.state import SlotState, StateSpec

_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 4e-3}

BLOCK = 32
"""tokens that a selective scan goes through one by one; the blocks of a sequence do so side by side"""
CHUNK = 64
"""tokens that `ssd` turns into one matrix product"""


def _step_size(dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool) -> Tensor:
    dt = dt.float()
    if dt_bias is not None:
        dt = dt + dt_bias.float()
    return F.softplus(dt) if dt_softplus else dt


def _scan(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    z: Tensor | None,
    *,
    A: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """state: `[S, I, N]`; x, dt, z: `[S, L, I]`; B, C: `[S, L, N]`."""
    dt, A = _step_size(dt, dt_bias, dt_softplus), A.float()
    output, state = _scan_blocks(state.float(), x.float() * dt, dt, B.float(), C.float(), A)
    if D is not None:
        output = output + x.float() * D.float()
    if z is not None:
        output = output * F.silu(z.float())
    return output.to(x.dtype), state


def _scan_blocks(state: Tensor, dx: Tensor, dt: Tensor, B: Tensor, C: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """A short sequence token by token; the blocks of a long one each from zero, and then what came before them added.

    The padding of the last block has dt = 0, which leaves a state as it is.
    """
    length = dx.shape[1]
    if length <= BLOCK:
        return _scan_tokens(state, dx, dt, B, C, A)
    blocks = -(-length // BLOCK)
    padding = (0, 0, 0, blocks * BLOCK - length)
    dx, dt, B, C = (F.pad(part, padding).unflatten(1, (blocks, BLOCK)) for part in (dx, dt, B, C))
    output, ends = _scan_tokens(state.new_zeros(state.shape[0], blocks, *state.shape[1:]), dx, dt, B, C, A)
    elapsed, before = dt.cumsum(2), []
    for block in range(blocks):
        before.append(state)
        state = torch.exp(elapsed[:, block, -1].unsqueeze(-1) * A) * state + ends[:, block]
    carried = torch.stack(before, dim=1)
    for t in range(BLOCK):
        faded = torch.exp(elapsed[:, :, t].unsqueeze(-1) * A) * carried
        output[:, :, t] += (faded @ C[:, :, t].unsqueeze(-1)).squeeze(-1)
    return output.flatten(1, 2)[:, :length], state


def _scan_tokens(state: Tensor, dx: Tensor, dt: Tensor, B: Tensor, C: Tensor, A: Tensor) -> tuple[Tensor, Tensor]:
    """Token by token. state: `[..., I, N]`; dx, dt: `[..., L, I]`; B, C: `[..., L, N]`."""
    outputs = []
    for t in range(dx.shape[-2]):
        added = dx[..., t, :].unsqueeze(-1) * B[..., t, :].unsqueeze(-2)
        state = torch.exp(dt[..., t, :].unsqueeze(-1) * A) * state + added
        outputs.append((state @ C[..., t, :].unsqueeze(-1)).squeeze(-1))
    return torch.stack(outputs, dim=-2), state


@op(tolerance=_TOLERANCE, opaque=True, fake=lambda x, *_: x.new_empty(x.shape))
def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """h_t = exp(dt_t · A) · h_(t-1) + dt_t · B_t · x_t; y_t = (C_t · h_t + D · x_t) · silu(z_t) (arXiv 2312.00752).

    Args:
        x, dt: `[1, T, I]`. B, C: `[1, T, N]`. A: `[I, N]`, negative.
        D: `[I]` or None. z: `[1, T, I]` or None.
        dt_bias: `[I]`, added to dt, or None. dt_softplus: dt goes through softplus then.
    Returns:
        `[1, T, I]`.
    """
    scan = partial(_scan, A=A, D=D, dt_bias=dt_bias, dt_softplus=dt_softplus)
    return over_sequences(scan, [x, dt, B, C, z], cu_seqlens, A.shape)


@op(tolerance=_TOLERANCE, opaque=True, mutates=("state",), fake=lambda x, *_: x.new_empty(x.shape))
def cached_selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    cu_seqlens: Tensor | None,
    state_slots: Tensor,
    state: Tensor,
) -> Tensor:
    """`selective_scan` of new tokens `[1, T, ...]`, continued from `state` `[slots, I, N]`."""
    scan = partial(_scan, A=A, D=D, dt_bias=dt_bias, dt_softplus=dt_softplus)
    return continue_sequences(scan, [x, dt, B, C, z], cu_seqlens, state, state_slots)


def _structured_scan(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    A: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float | None,
) -> tuple[Tensor, Tensor]:
    """state: `[S, H, P, N]`; x: `[S, L, H, P]`; dt: `[S, L, H]`; B, C: `[S, L, G, N]`."""
    dt = _step_size(dt, dt_bias, dt_softplus).clamp(dt_min, dt_max)
    dx, decay = (x.float() * dt.unsqueeze(-1)).transpose(1, 2), (dt * A.float()).transpose(1, 2)
    B, C = B.float().transpose(1, 2), C.float().transpose(1, 2)
    state, outputs = state.float(), []
    for start in range(0, x.shape[1], CHUNK):
        end = start + CHUNK
        output, state = _chunk(
            state, dx[:, :, start:end], decay[:, :, start:end], B[:, :, start:end], C[:, :, start:end]
        )
        outputs.append(output)
    output = torch.cat(outputs, dim=2).transpose(1, 2)
    if D is not None:
        output = output + x.float() * D.float().unsqueeze(-1)
    return output.to(x.dtype), state


def _chunk(state: Tensor, dx: Tensor, decay: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """One chunk as matrix products. dx: `[S, H, L, P]`; decay: `[S, H, L]`, logarithms; B, C: `[S, G, L, N]`."""
    per_group = dx.shape[1] // B.shape[1]
    total = decay.cumsum(-1)
    between = torch.exp(total.unsqueeze(-1) - total.unsqueeze(-2)).tril()
    scores = (C @ B.transpose(-1, -2)).repeat_interleave(per_group, dim=1) * between
    B, C = B.repeat_interleave(per_group, dim=1), C.repeat_interleave(per_group, dim=1)
    output = scores @ dx + (C @ state.transpose(-1, -2)) * total.exp().unsqueeze(-1)
    left = torch.exp(total[..., -1:] - total).unsqueeze(-1)
    return output, state * total[..., -1:].exp().unsqueeze(-1) + (dx * left).transpose(-1, -2) @ B


@op(tolerance=_TOLERANCE, opaque=True, fake=lambda x, *_: x.new_empty(x.shape))
def ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float | None,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """h_t = exp(dt_t · A) · h_(t-1) + dt_t · x_t ⊗ B_t and y_t = h_t · C_t + D · x_t for each head (arXiv 2405.21060).

    Args:
        x: `[1, T, H, P]`. dt: `[1, T, H]`. A: `[H]`, negative. B, C: `[1, T, G, N]`, a group for H / G heads.
        D: `[H]` or None.
        dt_bias: `[H]`, added to dt, or None. dt_softplus: dt goes through softplus then.
        dt_min, dt_max: limits of dt at last; None means no upper one.
    Returns:
        `[1, T, H, P]`.
    """
    scan = partial(_structured_scan, A=A, D=D, dt_bias=dt_bias, dt_softplus=dt_softplus, dt_min=dt_min, dt_max=dt_max)
    return over_sequences(scan, [x, dt, B, C], cu_seqlens, (*x.shape[2:], B.shape[3]))


@op(tolerance=_TOLERANCE, opaque=True, mutates=("state",), fake=lambda x, *_: x.new_empty(x.shape))
def cached_ssd(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float | None,
    cu_seqlens: Tensor | None,
    state_slots: Tensor,
    state: Tensor,
) -> Tensor:
    """`ssd` of new tokens `[1, T, ...]`, continued from `state` `[slots, H, P, N]`."""
    scan = partial(_structured_scan, A=A, D=D, dt_bias=dt_bias, dt_softplus=dt_softplus, dt_min=dt_min, dt_max=dt_max)
    return continue_sequences(scan, [x, dt, B, C], cu_seqlens, state, state_slots)


@selective_scan.with_states(cached_selective_scan)
def _scan_states(A: Tensor, **_: Any) -> dict[str, StateSpec]:
    return {"state": SlotState(name="state", shape=tuple(A.shape), dtype=torch.float32)}


@ssd.with_states(cached_ssd)
def _ssd_states(x: Tensor, B: Tensor, **_: Any) -> dict[str, StateSpec]:
    return {"state": SlotState(name="state", shape=(*x.shape[2:], B.shape[3]), dtype=torch.float32)}


_BOUNDARIES = torch.tensor([0, 1, 10, 11, 83], dtype=torch.int32)


@selective_scan.with_samples
def _scan_samples() -> list[dict[str, Any]]:
    x, dt, z = (torch.randn(1, 83, 6) for _ in range(3))
    B, C = torch.randn(1, 83, 5), torch.randn(1, 83, 5)
    plain: dict[str, Any] = {"x": x, "dt": dt, "A": -torch.rand(6, 5) * 4, "B": B, "C": C, "cu_seqlens": _BOUNDARIES}
    return [
        plain | {"D": torch.randn(6), "z": z, "dt_bias": torch.randn(6), "dt_softplus": True},
        plain | {"dt": dt.abs(), "D": None, "z": None, "dt_bias": None, "dt_softplus": False},
    ]


@ssd.with_samples
def _ssd_samples() -> list[dict[str, Any]]:
    x, dt, B, C = (torch.randn(1, 83, *shape) for shape in ((4, 3), (4,), (2, 5), (2, 5)))
    plain: dict[str, Any] = {"x": x, "dt": dt, "A": -torch.rand(4) * 4, "B": B, "C": C, "cu_seqlens": _BOUNDARIES}
    return [
        plain | {"D": torch.randn(4), "dt_bias": torch.randn(4), "dt_softplus": True, "dt_min": 0.1, "dt_max": 2.0},
        plain | {"dt": dt.abs(), "D": None, "dt_bias": None, "dt_softplus": False, "dt_min": 0.0, "dt_max": None},
    ]
