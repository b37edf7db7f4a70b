"""Random choice on the CPU: logits, sampling parameters and random numbers go in, one token per row comes out.

It is what the op `choose_tokens` says, for where it has no kernel, done row by row, with a look at each one's likely
tokens only.

Shapes: V vocabulary, N rows, C likely tokens.
"""

import math
from collections.abc import Sequence as SequenceOf

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autodeploy.runtime.request import SamplingParams

_REACH, _LAST_REACH = 3.5, 40.0
"""By how much, times the temperature, the search for a row's likely tokens goes further below the greatest logit each
time; and how far before all tokens are looked at."""

Row = NDArray[np.float32]
Uniforms = NDArray[np.float64]


def draw(logits_NV: Tensor, best_N: Tensor, params: SequenceOf[SamplingParams], uniforms_N: Uniforms) -> Tensor:
    """Tokens [N] int64, for logits on the CPU of any float dtype. Unusable rows give any token.

    Args:
        best_N: the greatest logit of each row.
    """
    tokens = []
    # Row by row in float32, so that a row stays in the processor's cache.
    for row_V, best, each, uniform in zip(logits_NV, best_N.tolist(), params, uniforms_N.tolist(), strict=True):
        tokens.append(_draw_row(row_V.float().numpy(), best, each, uniform))
    return torch.tensor(tokens)


def on_device(values: SequenceOf[float] | SequenceOf[int], like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Values as a tensor beside another, by default of its dtype, without waiting for the device."""
    tensor = torch.tensor(values, dtype=dtype or like.dtype, pin_memory=like.is_cuda)
    return tensor.to(like.device, non_blocking=True)


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
