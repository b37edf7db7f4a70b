"""Choosing tokens: rows of logits, sampling parameters and random keys go in, one token per row comes out; and how many
drafts are what was chosen.

Temperature, then min-p, top-k and top-p, then the cumulative distribution of what they leave is inverted at one random
number. Ties with the least likely token that is kept are kept too, so that no order of sorting matters. Every row
depends on its own logits, parameters, key and position only.

Shapes: R rows of logits, V vocabulary, C candidates.
"""

from typing import Any

import torch
from torch import Tensor

from autodeploy.ops.op import op

GAMMA, FIRST, SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
"""Of SplitMix64 (Steele, Lea and Flood, 2014)."""


@op(tolerance={torch.float32: 0.0, torch.bfloat16: 0.0})
def choose_tokens(
    logits: Tensor,
    temperature: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    keys: Tensor | None,
    positions: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The most likely token of each row, or one that is drawn; and the greatest logit of each row.

    Args:
        logits: `[R, V]`, any float dtype.
        temperature: float `[R]`, 0 where the most likely token is wanted; None wants it everywhere. Where it is
            negative nobody looks at what comes out, and it may be anything.
        top_k, top_p, min_p: int, float and float `[R]`; 0, 1 and 0 filter nothing. All or none of them are None.
        keys, positions: int64 `[R]`; what a row draws with is number `positions` of the generator `keys`, whose bits
            are those of an unsigned number. Given with a temperature.
    Returns:
        Tokens, int64 `[R]`, the first one of equally likely ones; best logits, float32 `[R]`, not finite where the
        row is unusable (a NaN, +inf, or -inf throughout) and its token is any.
    """
    numbers = logits.float()
    best = numbers.max(dim=-1, keepdim=True).values
    ids = torch.arange(logits.shape[-1], device=logits.device)
    tokens = torch.where(numbers == best, ids, len(ids) - 1).min(dim=-1).values
    if temperature is None or keys is None or positions is None:
        return tokens, best.squeeze(1)
    is_random = temperature > 0
    divisor = torch.where(is_random, temperature.float(), 1.0).unsqueeze(1)
    probabilities = torch.softmax(numbers / divisor, dim=-1)
    if top_k is not None and top_p is not None and min_p is not None:
        thresholds = _thresholds(probabilities, top_k.unsqueeze(1), top_p.unsqueeze(1), min_p.unsqueeze(1))
        probabilities = probabilities.masked_fill(probabilities < thresholds, 0.0)
    drawn = _invert(probabilities, uniform_numbers(keys, positions))
    return torch.where(is_random, drawn, tokens), best.squeeze(1)


@op()
def accept_drafts(tokens: Tensor, drafts: Tensor, starts: Tensor) -> Tensor:
    """How many drafts of each sequence are accepted: those before the first that was not chosen.

    A sequence with k drafts has k + 1 rows of logits, behind its last token and behind each draft. As rows are chosen
    from with the random numbers of their positions, the tokens are those that would be chosen one after the other.

    Args:
        tokens: int64 `[R]`, what was chosen in each row.
        drafts: int64 `[R]`, the draft that follows each row; -1 behind the last row of a sequence.
        starts: int `[S+1]`, where each sequence's rows start; one row at least for each.
    Returns:
        int64 `[S]`.
    """
    rows = torch.arange(len(tokens), device=tokens.device)
    ends = torch.where(tokens == drafts, len(tokens), rows)
    first_ends = ends.flip(0).cummin(0).values.flip(0)
    return first_ends[starts[:-1].long()] - starts[:-1].long()


def uniform_numbers(keys: Tensor, positions: Tensor) -> Tensor:
    """Numbers float64 `[R]` in [0, 1), one for each key and position, all 2**53 of them equally likely: SplitMix64."""
    bits = keys + (positions + 1) * as_int64(GAMMA)
    bits = (bits ^ _shifted(bits, 30)) * as_int64(FIRST)
    bits = (bits ^ _shifted(bits, 27)) * as_int64(SECOND)
    return _shifted(bits ^ _shifted(bits, 31), 11).double() * 2.0**-53


def as_int64(number: int) -> int:
    """The number with the bits of an unsigned one of 64 bits."""
    return number - (1 << 64) if number >> 63 else number


def _shifted(bits: Tensor, places: int) -> Tensor:
    """Bits of an unsigned number shifted to the right."""
    return (bits >> places) & ((1 << (64 - places)) - 1)


def _invert(probabilities: Tensor, numbers: Tensor) -> Tensor:
    """Tokens `[R]` where the cumulative distribution of `[R, V]` passes each number."""
    # float64: rounding in a float32 sum over 10^5 tokens is as large as a rare one.
    cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    target = torch.minimum(numbers.unsqueeze(1) * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True).squeeze(1).clamp_(max=probabilities.shape[-1] - 1)


def _thresholds(probabilities: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Smallest probability `[R, 1]` that survives the filters, `[R, 1]` each; 0 for a row without filters."""
    descending = probabilities.sort(dim=-1, descending=True).values
    rank = torch.arange(descending.shape[-1], device=descending.device)
    has_top_k = top_k > 0
    keep = (descending >= min_p * descending[:, :1]) & ((rank < top_k) | ~has_top_k)
    kept = torch.where(keep, descending, 0.0)
    mass = torch.where((min_p > 0) | has_top_k, kept.sum(dim=-1, keepdim=True), 1.0)
    before = kept.cumsum(dim=-1) - kept
    final = keep & ((before < top_p * mass) | (top_p >= 1.0))
    return descending.gather(-1, (final.sum(dim=-1, keepdim=True) - 1).clamp(min=0))


@choose_tokens.with_samples
def _samples() -> list[dict[str, Any]]:
    def sample(vocab_size: int, filters: dict[str, list[float]] | None, temperature: list[float]) -> dict[str, Any]:
        rows = len(temperature)
        names = {"top_k": torch.int32, "top_p": torch.float32, "min_p": torch.float32}
        columns = {name: None if filters is None else torch.tensor(filters[name], dtype=d) for name, d in names.items()}
        keys = torch.arange(rows) * as_int64(GAMMA) + 12345
        draws: dict[str, Any] = {"temperature": torch.tensor(temperature), "keys": keys, "positions": keys.abs() % 99}
        return {"logits": 2 * torch.randn(rows, vocab_size), **draws, **columns}

    filters = {
        "top_k": [0.0, 7, 0, 0, 500, 40, 3, 0],
        "top_p": [1.0, 1.0, 0.8, 1.0, 0.9, 0.7, 1.0, 0.5],
        "min_p": [0.0, 0.0, 0.0, 0.05, 0.0, 0.02, 0.3, 0.0],
    }
    mixed = sample(1500, filters, [1.0, 0.7, 1.5, 1.0, 4.0, 1.0, 0.0, 0.01])
    unusable = mixed["logits"].clone()
    unusable[1, 3], unusable[2] = torch.inf, -torch.inf
    unusable[6, [9, 800]] = 40.0  # equals: the first one is taken
    greedy = mixed | dict.fromkeys(("temperature", "top_k", "top_p", "min_p", "keys", "positions"))
    usable = mixed | {"logits": torch.where(unusable.isfinite(), unusable, 0.0)}
    return [mixed, sample(300, None, [1.0, 0.0, 0.3]), greedy, greedy | {"logits": unusable}, usable]


@accept_drafts.with_samples
def _draft_samples() -> list[dict[str, Any]]:
    starts = torch.tensor([0, 5, 6, 9, 49], dtype=torch.int32)
    drafts = torch.randint(0, 3, (49,))
    drafts[starts[1:].long() - 1] = -1
    wrong = (drafts + torch.randint(0, 2, (49,))) % 3
    right = drafts.clamp(min=0)
    return [{"tokens": tokens, "drafts": drafts, "starts": starts} for tokens in (right, wrong, right.flip(0))]
