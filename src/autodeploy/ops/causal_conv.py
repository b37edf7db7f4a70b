"""Short causal convolution along a sequence, one filter per channel, and its twin over a window of earlier tokens.

Shapes: T tokens in the packed row, C channels, W taps of each filter.
"""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from autodeploy.ops.mlp import ACTIVATIONS
from autodeploy.ops.op import op
from autodeploy.ops.packed import continue_sequences, over_sequences
from autodeploy.ops.state import SlotState, StateSpec

_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}


def _convolve(
    window: Tensor, x: Tensor, *, weight: Tensor, bias: Tensor | None, activation: str | None
) -> tuple[Tensor, Tensor]:
    """x: `[S, L, C]` after a window of `[S, W-1, C]` tokens; the result and the next window."""
    seen = torch.cat((window.to(x.dtype), x), dim=1)
    output = F.conv1d(seen.transpose(1, 2).to(weight.dtype), weight.unsqueeze(1), bias, groups=weight.shape[0])
    if activation is not None:
        output = ACTIVATIONS[activation](output)
    return output.transpose(1, 2).to(x.dtype), seen[:, x.shape[1] :]


@op(tolerance=_TOLERANCE, opaque=True, fake=lambda x, *_: x.new_empty(x.shape))
def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, cu_seqlens: Tensor | None
) -> Tensor:
    """activation(bias + sum over w of weight[:, w] · x[t - W + 1 + w]), tokens before a sequence being zero.

    Args:
        x: `[1, T, C]`. weight: `[C, W]`. bias: `[C]` or None.
        activation: a name in `mlp.ACTIVATIONS`, or None.
    Returns:
        `[1, T, C]`.
    """
    convolve = partial(_convolve, weight=weight, bias=bias, activation=activation)
    return over_sequences(convolve, [x], cu_seqlens, (weight.shape[1] - 1, x.shape[2]))


@op(tolerance=_TOLERANCE, opaque=True, mutates=("window",), fake=lambda x, *_: x.new_empty(x.shape))
def cached_causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    cu_seqlens: Tensor | None,
    state_slots: Tensor,
    window: Tensor,
) -> Tensor:
    """`causal_conv` of new tokens `[1, T, C]`, continued from the tokens before them in `window` `[slots, W-1, C]`."""
    convolve = partial(_convolve, weight=weight, bias=bias, activation=activation)
    return continue_sequences(convolve, [x], cu_seqlens, window, state_slots)


@causal_conv.with_states(cached_causal_conv)
def _states(x: Tensor, weight: Tensor, **_: Any) -> dict[str, StateSpec]:
    shape = (weight.shape[1] - 1, x.shape[2])
    return {"window": SlotState(name="window", shape=shape, dtype=x.dtype, shard_dim=1)}


@causal_conv.with_samples
def _samples() -> list[dict[str, Any]]:
    boundaries = torch.tensor([0, 1, 10, 11, 24], dtype=torch.int32)
    plain = {"x": torch.randn(1, 24, 6), "bias": None, "activation": None, "cu_seqlens": boundaries}
    return [
        plain | {"weight": torch.randn(6, 4), "bias": torch.randn(6), "activation": "silu"},
        plain | {"weight": torch.randn(6, 7)},
        plain | {"weight": torch.randn(6, 1)},
        plain | {"weight": torch.randn(6, 3), "cu_seqlens": torch.tensor([0, 24], dtype=torch.int32)},
    ]
