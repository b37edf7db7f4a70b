"""Random choice: logits and sampling parameters go in, one token per row comes out, drawn with a given random number.

Temperature, then min-p, top-k and top-p, then the cumulative distribution of what they leave is inverted. Ties with the
least likely token that is kept are kept too, so that no order of sorting matters.

On the CPU a row looks at its likely tokens only; elsewhere all rows are sorted at once, and nothing waits for the
device.

Shapes: V vocabulary, N rows, C candidates.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autodeploy.runtime.request import SamplingParams

NUM_CANDIDATES = 256
"""Tokens that are ranked where every row's top_k is below that; else all are."""

_CUT_STEP = 1 / 32
"""A row's likely tokens are at first those with this share of the greatest probability, then with its square, ..."""
_NEGLIGIBLE = 1e-30

Probabilities = NDArray[np.float32]


def draw(logits_NV: Tensor, params: SequenceOf[SamplingParams], uniforms_N: NDArray[np.float64]) -> Tensor:
    """Tokens [N] int64 on the logits' device. Rows of NaN give any token."""
    probabilities_NV = torch.softmax(logits_NV / on_device([p.temperature for p in params], logits_NV)[:, None], dim=-1)
    if logits_NV.device.type != "cpu":
        return draw_together(probabilities_NV, params, uniforms_N)
    rows = zip(probabilities_NV.numpy(), params, uniforms_N.tolist(), strict=True)
    return torch.tensor([_draw_row(*row) for row in rows])


def on_device(values: SequenceOf[float] | SequenceOf[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Values as a tensor beside another, by default of its dtype, without waiting for the device."""
    return torch.tensor(values, dtype=dtype or like.dtype).to(like.device, non_blocking=True)


def _draw_row(probabilities_V: Probabilities, params: SamplingParams, uniform: float) -> int:
    likely, kept = _likely_tokens(probabilities_V, params)
    # torch adds up faster than NumPy. float64: rounding in a float32 sum over 10^5 tokens is as large as a rare one.
    cumulative = torch.from_numpy(kept).cumsum(dim=0, dtype=torch.float64).numpy()
    target = min(uniform * cumulative[-1], np.nextafter(cumulative[-1], 0.0))
    at = min(int(np.searchsorted(cumulative, target, side="right")), len(kept) - 1)
    return at if likely is None else int(likely[at])


def _likely_tokens(
    probabilities_V: Probabilities, params: SamplingParams
) -> tuple[NDArray[np.int64] | None, Probabilities]:
    """The tokens that the filters leave, in the order of their ids, None for all; and their probabilities."""
    if params.top_k <= 0 and params.top_p >= 1.0 and params.min_p <= 0.0:
        return None, probabilities_V
    cut = float(probabilities_V.max())
    while True:
        cut = cut * _CUT_STEP if cut > _NEGLIGIBLE else 0.0
        tokens = np.flatnonzero(probabilities_V >= cut)
        candidates = probabilities_V[tokens]
        if not len(tokens):  # a row of NaN
            return None, probabilities_V
        threshold = _threshold(np.sort(candidates)[::-1], params, is_all=cut == 0.0)
        if threshold is not None:
            is_kept = candidates >= threshold
            return tokens[is_kept], candidates[is_kept]


def _threshold(sorted_C: Probabilities, params: SamplingParams, *, is_all: bool) -> np.float32 | None:
    """The smallest probability that the filters leave, given the C greatest; None where it takes more to know it."""
    num_left = len(sorted_C)
    mass: float = 1.0  # top_p is a share of what min_p and top_k leave; without them the softmax sums to one
    if params.min_p > 0.0 or params.top_k > 0:
        if params.min_p > 0.0:
            num_left = int(np.count_nonzero(sorted_C >= np.float32(params.min_p) * sorted_C[0]))
        if params.top_k > 0:
            num_left = min(num_left, params.top_k)
        if num_left == len(sorted_C) and not is_all:
            return None
        mass = float(sorted_C[:num_left].sum())
    if params.top_p < 1.0:
        before = np.cumsum(sorted_C[:num_left]) - sorted_C[:num_left]
        num_reached = max(1, int(np.count_nonzero(before < params.top_p * mass)))
        if num_reached == len(sorted_C) and not is_all:
            return None
        num_left = num_reached
    least: np.float32 = sorted_C[num_left - 1]
    return least


def draw_together(
    probabilities_NV: Tensor, params: SequenceOf[SamplingParams], uniforms_N: NDArray[np.float64]
) -> Tensor:
    """The same for all rows at once, without a look at any value."""
    if any(p.top_k > 0 or p.top_p < 1.0 or p.min_p > 0.0 for p in params):
        thresholds = _thresholds(probabilities_NV, params)
        probabilities_NV = probabilities_NV.masked_fill(probabilities_NV < thresholds, 0.0)
    cumulative = probabilities_NV.cumsum(dim=-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    target = torch.from_numpy(uniforms_N).to(total.device, non_blocking=True).unsqueeze(1) * total
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
    tokens = torch.searchsorted(cumulative, target, right=True).squeeze(1)
    return tokens.clamp_(max=probabilities_NV.shape[-1] - 1)


@dataclass(frozen=True)
class _Limits:
    """top_k (the vocabulary for off), top_p and min_p as columns [N, 1]."""

    top_k: Tensor
    top_p: Tensor
    min_p: Tensor

    @staticmethod
    def of(params: SequenceOf[SamplingParams], like: Tensor) -> "_Limits":
        vocab_size = like.shape[-1]
        top_k = [min(p.top_k, vocab_size) if p.top_k > 0 else vocab_size for p in params]
        columns = (top_k, [p.top_p for p in params], [p.min_p for p in params])
        return _Limits(*(on_device(values, like).unsqueeze(1) for values in columns))


def _thresholds(probabilities_NV: Tensor, params: SequenceOf[SamplingParams]) -> Tensor:
    """Smallest probability [N, 1] that survives the filters; 0 for a row without filters."""
    vocab_size = probabilities_NV.shape[-1]
    if all(0 < p.top_k < NUM_CANDIDATES for p in params):
        sorted_NC = probabilities_NV.topk(min(NUM_CANDIDATES, vocab_size), dim=-1).values
    else:
        sorted_NC = probabilities_NV.sort(dim=-1, descending=True).values
    limits = _Limits.of(params, probabilities_NV)
    rank = torch.arange(sorted_NC.shape[-1], device=sorted_NC.device)
    keep = (sorted_NC >= limits.min_p * sorted_NC[:, :1]) & (rank < limits.top_k)
    is_cut = (limits.min_p > 0) | (limits.top_k < vocab_size)
    kept = torch.where(keep, sorted_NC, 0.0)
    mass = torch.where(is_cut, kept.sum(dim=-1, keepdim=True), 1.0)
    before = kept.cumsum(dim=-1) - kept
    final = keep & ((before < limits.top_p * mass) | (limits.top_p >= 1.0))
    last = final.sum(dim=-1, keepdim=True) - 1
    return sorted_NC.gather(-1, last.clamp(min=0))
