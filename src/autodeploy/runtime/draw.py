"""Random choice: logits and sampling parameters go in, one token per row comes out, drawn with a given random number.

Temperature, then min-p, top-k and top-p, then the cumulative distribution of what they leave is inverted. Ties with the
least likely token that is kept are kept too, so that no order of sorting matters.

On the CPU a row looks at its likely tokens only; elsewhere all rows are sorted at once, and nothing waits for the
device.

Shapes: V vocabulary, N rows, C candidates.
"""

import math
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autodeploy.runtime.request import SamplingParams

NUM_CANDIDATES = 256
"""Tokens that are ranked where every row's top_k is below that; else all are."""

_REACH, _LAST_REACH = 3.5, 40.0
"""By how much, times the temperature, the search for a row's likely tokens goes further below the greatest logit each
time; and how far before all tokens are looked at."""

Row = NDArray[np.float32]
Uniforms = NDArray[np.float64]


def draw(logits_NV: Tensor, best_N: Tensor, params: SequenceOf[SamplingParams], uniforms_N: Uniforms) -> Tensor:
    """Tokens [N] int64 on the logits' device, for logits of any float dtype. Unusable rows give any token.

    Args:
        best_N: the greatest logit of each row.
    """
    if logits_NV.device.type != "cpu":
        scaled_NV = logits_NV.float() / on_device([p.temperature for p in params], best_N, torch.float32).unsqueeze(1)
        return draw_together(torch.softmax(scaled_NV, dim=-1), params, uniforms_N)
    tokens = []
    # Row by row in float32, so that a row stays in the processor's cache.
    for row_V, best, each, uniform in zip(logits_NV, best_N.tolist(), params, uniforms_N.tolist(), strict=True):
        tokens.append(_draw_row(row_V.float().numpy(), best, each, uniform))
    return torch.tensor(tokens)


def on_device(values: SequenceOf[float] | SequenceOf[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Values as a tensor beside another, by default of its dtype, without waiting for the device."""
    return torch.tensor(values, dtype=dtype or like.dtype).to(like.device, non_blocking=True)


def _draw_row(logits_V: Row, best: float, params: SamplingParams, uniform: float) -> int:
    if not math.isfinite(best):
        return 0
    likely, weights = _likely_tokens(logits_V, best, params)
    # torch adds up faster than NumPy. float64: rounding in a float32 sum over 10^5 tokens is as large as a rare one.
    cumulative = torch.from_numpy(weights).cumsum(dim=0, dtype=torch.float64).numpy()
    target = min(uniform * cumulative[-1], np.nextafter(cumulative[-1], 0.0))
    at = int(np.searchsorted(cumulative, target, side="right"))
    return at if likely is None else int(likely[at])


def _likely_tokens(logits_V: Row, best: float, params: SamplingParams) -> tuple[NDArray[np.int64] | None, Row]:
    """The tokens that the filters leave, in the order of their ids, None for all; and their weights: probabilities
    relative to the most likely token's.
    """
    is_cut = params.min_p > 0.0 or params.top_k > 0
    if params.top_p >= 1.0 and not is_cut:
        return None, _weights(logits_V, best, params)
    total = None if is_cut else float(_weights(logits_V, best, params).sum())
    reach = _REACH
    while True:
        is_all = reach > _LAST_REACH
        tokens = np.flatnonzero(logits_V >= (-math.inf if is_all else best - params.temperature * reach))
        weights = _weights(logits_V[tokens], best, params)
        threshold = _threshold(np.sort(weights)[::-1], params, total, is_all=is_all)
        if threshold is not None:
            is_kept = weights >= threshold
            return tokens[is_kept], weights[is_kept]
        reach += _REACH


def _weights(logits_C: Row, best: float, params: SamplingParams) -> Row:
    weights: Row = logits_C - np.float32(best)
    if params.temperature != 1.0:
        weights /= np.float32(params.temperature)
    torch.from_numpy(weights).exp_()  # faster than NumPy's
    return weights


def _threshold(sorted_C: Row, params: SamplingParams, total: float | None, *, is_all: bool) -> np.float32 | None:
    """The smallest weight that the filters leave, given the C greatest; None where it takes more to know it.

    Args:
        total: of all weights, where top_p is the only filter; else it is a share of what min_p and top_k leave.
    """
    num_left = len(sorted_C)
    if params.min_p > 0.0:
        num_left = int(np.count_nonzero(sorted_C >= np.float32(params.min_p)))
    if params.top_k > 0:
        num_left = min(num_left, params.top_k)
    if total is None:
        if num_left == len(sorted_C) and not is_all:
            return None
        total = float(sorted_C[:num_left].sum())
    if params.top_p < 1.0:
        before = np.cumsum(sorted_C[:num_left]) - sorted_C[:num_left]
        num_reached = max(1, int(np.count_nonzero(before < params.top_p * total)))
        if num_reached == len(sorted_C) and not is_all:
            return None
        num_left = num_reached
    least: np.float32 = sorted_C[num_left - 1]
    return least


def draw_together(probabilities_NV: Tensor, params: SequenceOf[SamplingParams], uniforms_N: Uniforms) -> Tensor:
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
