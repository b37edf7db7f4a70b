"""accept_drafts; and choose_tokens without a sort: rows are read a few times over, in parts, by as many as are idle.

1. The greatest logit of each part.
2. How many tokens of a part lie how far below the greatest of the row, and what they weigh.
3. Where there are filters: the ids, in order, of all tokens of the level that certainly holds what they leave. In a row
   where these are too many, all tokens are candidates.
4. One program for each row searches the candidates for the exact threshold, eight values at a time, and walks through
   what is left up to its random number. Without filters it walks through the part that the number falls into.

Weights are probabilities relative to the most likely token's; they are float32 and added up in float64.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from autodeploy.kernels.triton.launch import Launcher, num_processors, why_elsewhere, why_refused
from autodeploy.ops import sampling as op
from autodeploy.ops.sampling import accept_drafts, choose_tokens

_LEAST_TOKENS_OF_PART = 2048
_MOST_PARTS = 64
_LEVELS = 8
_CAPACITY = 16384
"""Candidates of a row that there is room for."""
_BLOCK = 1024
"""Tokens that are looked at together where parts of rows are read; a part is a whole number of them."""
_GAMMA, _FIRST, _SECOND = tl.constexpr(op.GAMMA), tl.constexpr(op.FIRST), tl.constexpr(op.SECOND)


@triton.jit
def _part(width, part, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """The tokens that one part of a row has."""
    size = tl.cdiv(tl.cdiv(width, PARTS), BLOCK) * BLOCK
    return part * size, tl.minimum((part + 1) * size, width)


@triton.jit
def _find_best(
    logits, best_parts, token_parts, temperatures, width, row_stride, PARTS: tl.constexpr, PART_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    begin, end = _part(width, part, PARTS, PART_BLOCK)
    if temperatures is not None:
        # A row that nobody looks at has no best logit, so that all that follows leaves it alone too.
        end = tl.where(tl.load(temperatures + row).to(tl.float32) >= 0, end, begin)
    lane = tl.arange(0, BLOCK)
    best = tl.full([BLOCK], float("-inf"), tl.float32)
    token = begin + lane
    for start in range(begin, end, BLOCK):
        ids = start + lane
        value = tl.load(logits + row * row_stride + ids, mask=ids < end, other=float("-inf")).to(tl.float32)
        value = tl.where(value == value, value, float("inf"))  # a NaN makes the row as unusable
        is_better = value > best
        best = tl.where(is_better, value, best)
        token = tl.where(is_better, ids, token)
    top = tl.max(best, 0)
    tl.store(best_parts + row * PARTS + part, top)
    tl.store(token_parts + row * PARTS + part, tl.min(tl.where(best == top, token, 2147483647), 0))


@triton.jit
def _best_of_row(best_parts, token_parts, row, width, PARTS: tl.constexpr):
    """The greatest logit of a row, and the first token that has it."""
    parts = row * PARTS + tl.arange(0, PARTS)
    values = tl.load(best_parts + parts)
    best = tl.max(values, 0)
    token = tl.min(tl.where(values == best, tl.load(token_parts + parts), 2147483647), 0)
    return best, tl.minimum(token, width - 1)


@triton.jit
def _reach(LEVELS: tl.constexpr):
    """How far below the greatest logit, in temperatures, each level goes; the last one has all tokens."""
    level = tl.arange(0, LEVELS)
    return tl.where(level == LEVELS - 1, float("inf"), 0.4 * (level + 1) * (level + 1))


@triton.jit
def _distances(logits, ids, is_inside, best, temperature):
    """How far tokens lie below the best one, in temperatures; infinitely outside."""
    value = tl.load(logits + ids, mask=is_inside, other=float("-inf")).to(tl.float32)
    return (best - value) / temperature


@triton.jit
def _weigh(
    logits, best_parts, token_parts, temperatures, counts, masses, width, row_stride,
    PARTS: tl.constexpr, LEVELS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    temperature = tl.load(temperatures + row).to(tl.float32)
    best, _ = _best_of_row(best_parts, token_parts, row, width, PARTS)
    begin, end = _part(width, part, PARTS, BLOCK)
    if temperature <= 0 or tl.abs(best) == float("inf"):
        end = begin
    reach = _reach(LEVELS)
    count = tl.zeros([LEVELS], tl.int32)
    mass = tl.zeros([LEVELS], tl.float64)
    for start in range(begin, end, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        distance = _distances(logits + row * row_stride, ids, ids < end, best, temperature)
        reached = (distance[:, None] <= reach[None, :]) & (ids < end)[:, None]
        count += tl.sum(reached.to(tl.int32), 0)
        mass += tl.sum(tl.where(reached, tl.exp(-distance)[:, None], 0.0).to(tl.float64), 0)
    place = (row * PARTS + part) * LEVELS + tl.arange(0, LEVELS)
    tl.store(counts + place, count)
    tl.store(masses + place, mass)


@triton.jit
def _level(counts, masses, row, top_k, top_p, min_p, PARTS: tl.constexpr, LEVELS: tl.constexpr):
    """The first level that holds all tokens that the filters of a row leave, how many it holds, and the row's mass."""
    level = tl.arange(0, LEVELS)
    place = (row * PARTS + tl.arange(0, PARTS))[:, None] * LEVELS + level[None, :]
    count = tl.sum(tl.load(counts + place), 0)
    mass = tl.sum(tl.load(masses + place), 0)
    total = tl.sum(tl.where(level == LEVELS - 1, mass, 0.0), 0)
    enough_tokens = tl.where(top_k > 0, top_k, 2147483647)
    enough_mass = tl.where((top_k > 0) | (min_p > 0), float("inf"), top_p * total)  # else of what those leave
    holds = (count >= enough_tokens) | (mass >= enough_mass) | (tl.exp(-_reach(LEVELS)) <= min_p)
    first = tl.min(tl.where(holds | (level == LEVELS - 1), level, LEVELS), 0)
    return first, tl.sum(tl.where(level == first, count, 0), 0), total


@triton.jit
def _filters(top_ks, top_ps, min_ps, row):
    """Those of a row, and whether one is on."""
    top_k, top_p = tl.load(top_ks + row).to(tl.int32), tl.load(top_ps + row).to(tl.float32)
    min_p = tl.load(min_ps + row).to(tl.float32)
    return top_k, top_p, min_p, (top_k > 0) | (top_p < 1) | (min_p > 0)


@triton.jit
def _gather_candidates(
    logits, best_parts, token_parts, temperatures, top_ks, top_ps, min_ps, counts, masses, candidates, width,
    row_stride, PARTS: tl.constexpr, LEVELS: tl.constexpr, CAPACITY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, part = tl.program_id(0).to(tl.int64), tl.program_id(1)
    temperature = tl.load(temperatures + row).to(tl.float32)
    top_k, top_p, min_p, is_filtered = _filters(top_ks, top_ps, min_ps, row)
    best, _ = _best_of_row(best_parts, token_parts, row, width, PARTS)
    level, num_candidates, _ = _level(counts, masses, row, top_k, top_p, min_p, PARTS, LEVELS)
    begin, end = _part(width, part, PARTS, BLOCK)
    if temperature <= 0 or tl.abs(best) == float("inf") or num_candidates > CAPACITY or is_filtered == 0:
        end = begin
    parts = tl.arange(0, PARTS)
    before = tl.load(counts + (row * PARTS + parts) * LEVELS + level, mask=parts < part, other=0)
    place = candidates + row * CAPACITY + tl.sum(before, 0)
    reach = tl.sum(tl.where(tl.arange(0, LEVELS) == level, _reach(LEVELS), 0.0), 0)
    for start in range(begin, end, BLOCK):
        ids = start + tl.arange(0, BLOCK)
        distance = _distances(logits + row * row_stride, ids, ids < end, best, temperature)
        reached = ((distance <= reach) & (ids < end)).to(tl.int32)
        tl.store(place + tl.cumsum(reached, 0) - 1, ids, mask=reached != 0)
        place += tl.sum(reached, 0)


@triton.jit
def _weights(logits, candidates, num_listed, start, end, best, temperature, BLOCK: tl.constexpr):
    """Ids and weights of a block of candidates, 0 outside. As many as `num_listed` are listed; if none is, all tokens
    are candidates.
    """
    ids = start + tl.arange(0, BLOCK)
    is_inside = ids < end
    if candidates is not None:
        listed = tl.load(candidates + ids, mask=ids < num_listed, other=0)
        ids = tl.where(num_listed > 0, listed, ids)
    return ids, tl.where(is_inside, tl.exp(-_distances(logits, ids, is_inside, best, temperature)), 0.0)


@triton.jit
def _search(
    logits, candidates, num_listed, end, best, temperature, wanted, BY_COUNT: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """The greatest weight so that as many candidates have at least that one, or candidates that weigh as much have.

    The bits of positive numbers are ordered like these; three of them are found each time.
    """
    found = tl.full((), 0, tl.int32)
    for digit in range(10):
        step = 1 << (27 - 3 * digit)
        limits = (found + tl.arange(0, 8) * step).to(tl.float32, bitcast=True)
        reached = tl.zeros([8], tl.float64)
        for start in range(0, end, BLOCK):
            _, weights = _weights(logits, candidates, num_listed, start, end, best, temperature, BLOCK)
            has_reached = (start + tl.arange(0, BLOCK) < end)[:, None] & (weights[:, None] >= limits[None, :])
            amounts = tl.where(has_reached, 1.0 if BY_COUNT else weights[:, None], 0.0)
            reached += tl.sum(amounts.to(tl.float64), 0)
        found += tl.maximum(tl.sum((reached >= wanted).to(tl.int32), 0) - 1, 0) * step
    return found.to(tl.float32, bitcast=True)


@triton.jit
def _sum_from(logits, candidates, num_listed, end, best, temperature, least, BLOCK: tl.constexpr):
    """How many candidates weigh at least that much, and what they weigh together."""
    counts = tl.zeros([BLOCK], tl.int32)
    masses = tl.zeros([BLOCK], tl.float64)
    for start in range(0, end, BLOCK):
        _, weights = _weights(logits, candidates, num_listed, start, end, best, temperature, BLOCK)
        is_kept = (start + tl.arange(0, BLOCK) < end) & (weights >= least)
        counts += is_kept.to(tl.int32)
        masses += tl.where(is_kept, weights, 0.0).to(tl.float64)
    return tl.sum(counts, 0), tl.sum(masses, 0)


@triton.jit
def _least_weight(
    logits, candidates, num_listed, end, best, temperature, top_k, top_p, min_p, row_mass, BLOCK: tl.constexpr
):  # fmt: skip
    """The least weight that the filters leave."""
    least = min_p
    mass = row_mass
    if (top_k > 0) | (min_p > 0):
        num_left, mass = _sum_from(logits, candidates, num_listed, end, best, temperature, min_p, BLOCK)
        if (top_k > 0) & (top_k < num_left):
            least = _search(logits, candidates, num_listed, end, best, temperature, top_k, True, BLOCK)
            num_left, mass = _sum_from(logits, candidates, num_listed, end, best, temperature, least, BLOCK)
            mass -= (num_left - top_k).to(tl.float64) * least  # of ties, as many as top_k counts
    if top_p < 1:
        by_mass = _search(logits, candidates, num_listed, end, best, temperature, top_p * mass, False, BLOCK)
        least = tl.maximum(least, by_mass)
    return least


@triton.jit
def _walk(
    logits, candidates, num_listed, begin, end, best, temperature, least, before, target, BLOCK: tl.constexpr
):  # fmt: skip
    """The first candidate with which weights, those before added, pass the target; else the last one. Candidates that
    weigh less than `least` are passed over.
    """
    passed = before
    found_start = begin
    found_before = before
    for start in range(begin, end, BLOCK):
        _, weights = _weights(logits, candidates, num_listed, start, end, best, temperature, BLOCK)
        mass = tl.sum(tl.where(weights >= least, weights, 0.0).to(tl.float64), 0)
        is_later = (passed <= target) & (mass > 0)
        found_start = tl.where(is_later, start, found_start)
        found_before = tl.where(is_later, passed, found_before)
        passed += mass
    ids, weights = _weights(logits, candidates, num_listed, found_start, end, best, temperature, BLOCK)
    is_kept = (weights >= least) & (weights > 0)
    sums = found_before + tl.cumsum(tl.where(is_kept, weights, 0.0).to(tl.float64), 0)
    token = tl.min(tl.where(is_kept & (sums > target), ids, 2147483647), 0)
    return tl.where(token == 2147483647, tl.max(tl.where(is_kept, ids, 0), 0), token)


@triton.jit
def _target(number, mass):
    """Where in a mass a number in [0, 1) falls; never at its end, whatever is rounded."""
    return tl.minimum(number * mass, mass * (1 - 1.1102230246251565e-16))


@triton.jit
def _draw_filtered(
    logits, candidates, best, temperature, top_k, top_p, min_p, counts, masses, row, width, number,
    PARTS: tl.constexpr, LEVELS: tl.constexpr, CAPACITY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    _, end, mass = _level(counts, masses, row, top_k, top_p, min_p, PARTS, LEVELS)
    num_listed = tl.where(end <= CAPACITY, end, 0)
    end = tl.where(end <= CAPACITY, end, width)
    least = _least_weight(
        logits, candidates, num_listed, end, best, temperature, top_k, top_p, min_p, mass, BLOCK
    )  # fmt: skip
    _, mass = _sum_from(logits, candidates, num_listed, end, best, temperature, least, BLOCK)
    target = _target(number, mass)
    return _walk(logits, candidates, num_listed, 0, end, best, temperature, least, mass * 0, target, BLOCK)


@triton.jit
def _draw_unfiltered(
    logits, best, temperature, masses, row, width, number, PARTS: tl.constexpr, LEVELS: tl.constexpr,
    PART_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    parts = tl.arange(0, PARTS)
    of_parts = tl.load(masses + (row * PARTS + parts) * LEVELS + LEVELS - 1)
    target = _target(number, tl.sum(of_parts, 0))
    before = tl.cumsum(of_parts, 0) - of_parts
    part = tl.max(tl.where((before <= target) & (of_parts > 0), parts, 0), 0)
    begin, end = _part(width, part, PARTS, PART_BLOCK)
    passed = tl.sum(tl.where(parts == part, before, 0.0), 0)
    return _walk(logits, None, 0, begin, end, best, temperature, -1.0, passed, target, BLOCK)


@triton.jit
def _uniform(keys, positions, row):
    """A number in [0, 1), see `ops/sampling.py`."""
    one = row + tl.arange(0, 1)
    bits = tl.load(keys + one).to(tl.uint64, bitcast=True)
    bits += (tl.load(positions + one) + 1).to(tl.uint64, bitcast=True) * _GAMMA
    bits = (bits ^ (bits >> 30)) * _FIRST
    bits = (bits ^ (bits >> 27)) * _SECOND
    bits = (bits ^ (bits >> 31)) >> 11
    return tl.sum(bits.to(tl.float64) * 1.1102230246251565e-16, 0)


@triton.jit
def _choose(
    logits, best_parts, token_parts, temperatures, top_ks, top_ps, min_ps, keys, positions, counts, masses, candidates,
    tokens, bests, width, row_stride,
    PARTS: tl.constexpr, LEVELS: tl.constexpr, CAPACITY: tl.constexpr, PART_BLOCK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    best, token = _best_of_row(best_parts, token_parts, row, width, PARTS)
    tl.store(bests + row, best)
    if temperatures is not None:
        temperature = tl.load(temperatures + row).to(tl.float32)
        number = _uniform(keys, positions, row)
        logits += row * row_stride
        is_random = (temperature > 0) & (tl.abs(best) != float("inf"))
        if top_ks is not None:
            top_k, top_p, min_p, is_filtered = _filters(top_ks, top_ps, min_ps, row)
            if is_random & is_filtered:
                token = _draw_filtered(
                    logits, candidates + row * CAPACITY, best, temperature, top_k, top_p, min_p, counts, masses, row,
                    width, number, PARTS, LEVELS, CAPACITY, BLOCK,
                )  # fmt: skip
            is_random = is_random & (is_filtered == 0)
        if is_random:
            token = _draw_unfiltered(
                logits, best, temperature, masses, row, width, number, PARTS, LEVELS, PART_BLOCK, BLOCK
            )
    tl.store(tokens + row, token.to(tl.int64))


_find_best_parts = Launcher(
    _find_best,
    [triton.Config({"BLOCK": 1024}, num_warps=4), triton.Config({"BLOCK": 4096}, num_warps=8)],
    key=("width",),
)
_weigh_parts = Launcher(_weigh, [triton.Config({}, num_warps=8)])
_list_candidates = Launcher(_gather_candidates, [triton.Config({}, num_warps=4)])
_choose_one = Launcher(_choose, [triton.Config({"BLOCK": 512}, num_warps=4)])


def _supports(
    logits: Tensor,
    temperature: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    keys: Tensor | None,
    positions: Tensor | None,
) -> str | None:
    return why_refused(logits)


@choose_tokens.kernel("triton", _supports)
def choose_tokens_triton(
    logits: Tensor,
    temperature: Tensor | None,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    keys: Tensor | None,
    positions: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`choose_tokens` in two launches where every row wants its most likely token, else three, or four with filters."""
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    rows, width = logits.shape
    parts = 2 * num_processors(logits.device) // max(rows, 1)
    parts = 1 << max(min(parts, width // _LEAST_TOKENS_OF_PART, _MOST_PARTS), 1).bit_length() - 1
    best_parts = logits.new_empty(rows, parts, dtype=torch.float32)
    token_parts = logits.new_empty(rows, parts, dtype=torch.int32)
    tokens, best = logits.new_empty(rows, dtype=torch.int64), logits.new_empty(rows, dtype=torch.float32)
    sizes = {"width": width, "row_stride": logits.stride(0), "PARTS": parts}
    grid, blocks = (rows, parts), {"BLOCK": _BLOCK}
    _find_best_parts(grid, logits, best_parts, token_parts, temperature, **sizes, PART_BLOCK=_BLOCK)
    of_parts = (logits, best_parts, token_parts)
    filters = (top_k, top_p, min_p)
    levels = {"LEVELS": 1 if top_k is None else _LEVELS}
    counts = masses = candidates = None
    if temperature is not None:
        counts = logits.new_empty(rows, parts, levels["LEVELS"], dtype=torch.int32)
        masses = logits.new_empty(rows, parts, levels["LEVELS"], dtype=torch.float64)
        _weigh_parts(grid, *of_parts, temperature, counts, masses, **sizes, **levels, **blocks)
        if top_k is not None:
            levels["CAPACITY"] = min(_CAPACITY, width)
            candidates = logits.new_empty(rows, levels["CAPACITY"], dtype=torch.int32)
            found = (counts, masses, candidates)
            _list_candidates(grid, *of_parts, temperature, *filters, *found, **sizes, **levels, **blocks)
    draws = (temperature, *filters, keys, positions, counts, masses, candidates)
    levels.setdefault("CAPACITY", 0)
    _choose_one((rows,), *of_parts, *draws, tokens, best, **sizes, **levels, PART_BLOCK=_BLOCK)
    return tokens, best


@triton.jit
def _accept(tokens, drafts, starts, accepted, BLOCK: tl.constexpr):
    sequence = tl.program_id(0)
    begin, end = tl.load(starts + sequence).to(tl.int32), tl.load(starts + sequence + 1).to(tl.int32)
    first = end
    for start in range(begin, end, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        token, draft = (
            tl.load(tokens + rows, mask=rows < end, other=0),
            tl.load(drafts + rows, mask=rows < end, other=0),
        )
        first = tl.minimum(first, tl.min(tl.where(token != draft, rows, end), 0))
    tl.store(accepted + sequence, (first - begin).to(tl.int64))


_accept_rows = Launcher(_accept, [triton.Config({"BLOCK": 32}, num_warps=1)])


def _supports_drafts(tokens: Tensor, drafts: Tensor, starts: Tensor) -> str | None:
    return why_elsewhere(tokens)


@accept_drafts.kernel("triton", _supports_drafts)
def accept_drafts_triton(tokens: Tensor, drafts: Tensor, starts: Tensor) -> Tensor:
    """`accept_drafts`, a program for each sequence."""
    accepted = tokens.new_empty(len(starts) - 1, dtype=torch.int64)
    _accept_rows((len(starts) - 1,), tokens, drafts, starts, accepted)
    return accepted
