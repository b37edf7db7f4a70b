"""Sampling: logits and the sequences they belong to go in, one token per row and its log-probabilities come out.

The order is: penalties, constraints, temperature, min-p, top-k, top-p, then one uniform draw per row through the
cumulative distribution. Every row depends on its own logits, parameters and random numbers only, never on its
neighbours in the batch. Random numbers are drawn on the host, one per token: a seed means the same on every device.

Shapes: V vocabulary, R rows of logits, N rows that are sampled at random, C candidates.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autodeploy.runtime.constraints import Constraints
from autodeploy.runtime.grammar import GrammarCompiler
from autodeploy.runtime.request import Logprob, Sequence

NUM_CANDIDATES = 256
"""Most likely tokens looked at before a whole row is sorted; enough for all but flat distributions."""

ROWS_AT_ONCE = 64
"""Rows whose log-probabilities are computed together: those of a whole prompt would be a copy of all its logits."""


@dataclass(frozen=True)
class Samples:
    """Per row: the token, or None where the logits are unusable (NaN, +inf, all -inf); log-probabilities if asked."""

    token_ids: list[int | None]
    logprobs: list[dict[int, Logprob] | None]


@dataclass(eq=False)
class _History:
    """What the penalties need of one sequence's tokens, kept up to date token by token."""

    seen_V: Tensor
    output_counts_V: Tensor
    num_tokens: int = 0

    def update(self, sequence: Sequence) -> None:
        device = self.seen_V.device
        new = torch.tensor(sequence.token_ids[self.num_tokens :], dtype=torch.int64, device=device)
        first_output = max(0, sequence.num_prompt_tokens - self.num_tokens)
        self.seen_V[new] = True
        outputs = new[first_output:]
        self.output_counts_V.index_add_(0, outputs, torch.ones_like(outputs, dtype=torch.float32))
        self.num_tokens = len(sequence.token_ids)


@dataclass(eq=False)
class Sampler:
    """Chooses tokens. Keeps a random generator per seeded sequence and a token history per penalised one.

    Attributes:
        seed: seed of the generator that sequences without a seed share; None takes one from the system.
        grammars: compiles what guided sequences follow; None serves none.
        constraints: what sequences may say next.
    """

    seed: int | None = None
    grammars: GrammarCompiler | None = None
    constraints: Constraints = field(init=False)
    _generator: torch.Generator = field(init=False)
    _generators: dict[Sequence, torch.Generator] = field(init=False, default_factory=dict)
    _histories: dict[Sequence, _History] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.constraints = Constraints(self.grammars)
        self._generator = torch.Generator()
        if self.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(self.seed)

    def release(self, sequence: Sequence) -> None:
        """Forget a finished sequence. A preempted one keeps its generator, or it would repeat its random numbers."""
        self._generators.pop(sequence, None)
        self._histories.pop(sequence, None)
        self.constraints.release(sequence)

    @torch.inference_mode()
    def sample(self, logits_RV: Tensor, sequences: SequenceOf[Sequence]) -> Samples:
        """One token for each row of `logits_RV` (any float dtype), whose sequences are given in the same order."""
        if all(sequence.is_plain for sequence in sequences):
            best_R, tokens_R = _best(logits_RV)
            return Samples(_valid_tokens(tokens_R, best_R), [None] * len(sequences))
        raw_RV = logits_RV.float()
        logits_RV = self.constraints.apply(self._penalise(raw_RV, sequences), sequences)
        best_R, tokens_R = _best(logits_RV)
        random_rows = [row for row, sequence in enumerate(sequences) if not sequence.params.is_greedy]
        if random_rows:
            chosen = [sequences[row] for row in random_rows]
            tokens_R[random_rows] = _draw(logits_RV[random_rows], chosen, self._uniforms(chosen))
        token_ids = _valid_tokens(tokens_R, best_R)
        return Samples(token_ids, _logprobs(raw_RV, token_ids, sequences))

    def _penalise(self, logits_RV: Tensor, sequences: SequenceOf[Sequence]) -> Tensor:
        """Repetition penalty over prompt and output, frequency and presence penalty over output."""
        rows = [row for row, sequence in enumerate(sequences) if sequence.params.has_penalties]
        if not rows:
            return logits_RV
        histories = [self._history(sequences[row], logits_RV) for row in rows]
        seen = torch.stack([history.seen_V for history in histories])
        counts = torch.stack([history.output_counts_V for history in histories])
        params = [sequences[row].params for row in rows]
        logits = logits_RV[rows]
        repetition = _column([p.repetition_penalty for p in params], logits)
        penalised = torch.where(logits > 0, logits / repetition, logits * repetition)
        logits = torch.where(seen, penalised, logits)
        logits = logits - _column([p.frequency_penalty for p in params], logits) * counts
        logits = logits - _column([p.presence_penalty for p in params], logits) * (counts > 0)
        result_RV = logits_RV.clone()
        result_RV[rows] = logits
        return result_RV

    def _history(self, sequence: Sequence, logits_RV: Tensor) -> _History:
        history = self._histories.get(sequence)
        if history is None:
            zeros = torch.zeros(logits_RV.shape[-1], dtype=torch.float32, device=logits_RV.device)
            history = self._histories[sequence] = _History(zeros.bool(), zeros)
        history.update(sequence)
        return history

    def _uniforms(self, sequences: SequenceOf[Sequence]) -> Tensor:
        """One float64 in [0, 1) per sequence, from its own generator if it has a seed."""
        draws = torch.rand(len(sequences), dtype=torch.float64, generator=self._generator)
        for row, sequence in enumerate(sequences):
            if sequence.params.seed is not None:
                generator = self._generators.get(sequence)
                if generator is None:
                    seed = (sequence.params.seed + sequence.index) % 2**63
                    generator = self._generators[sequence] = torch.Generator().manual_seed(seed)
                draws[row] = torch.rand((), dtype=torch.float64, generator=generator)
        return draws


def _column(values: list[float], like: Tensor) -> Tensor:
    """Values as a column [N, 1] that broadcasts over the rows of `like`."""
    return torch.tensor(values, dtype=like.dtype).to(like.device).unsqueeze(1)


def _best(logits_RV: Tensor) -> tuple[Tensor, Tensor]:
    """The greatest logit of each row and its token. A NaN counts as the greatest."""
    if logits_RV.device.type != "cpu":
        best = logits_RV.max(dim=-1)
        return best.values, best.indices
    # NumPy, because torch's CPU argmax is not vectorised: 75 against 5 microseconds for a row of 49152.
    tokens_R = torch.from_numpy(logits_RV.float().numpy().argmax(axis=-1))
    return logits_RV.gather(-1, tokens_R.unsqueeze(1)).squeeze(1), tokens_R


def _valid_tokens(tokens_R: Tensor, best_R: Tensor) -> list[int | None]:
    """Tokens as ints; None where the row's greatest logit is not finite (max passes NaN on)."""
    tokens: list[int | None] = list(tokens_R.tolist())
    is_valid = torch.isfinite(best_R)
    if not bool(is_valid.all()):
        tokens = [token if valid else None for token, valid in zip(tokens, is_valid.tolist(), strict=True)]
    return tokens


def _draw(logits_NV: Tensor, sequences: SequenceOf[Sequence], uniforms_N: Tensor) -> Tensor:
    """Tokens [N] drawn from the softmax of the filtered logits by inverting the cumulative distribution."""
    params = [sequence.params for sequence in sequences]
    probabilities = torch.softmax(logits_NV / _column([p.temperature for p in params], logits_NV), dim=-1)
    filtered = [row for row, p in enumerate(params) if p.top_k > 0 or p.top_p < 1.0 or p.min_p > 0.0]
    thresholds = torch.zeros_like(probabilities[:, :1])
    if filtered:
        chosen = probabilities if len(filtered) == len(params) else probabilities[filtered]
        thresholds[filtered] = _thresholds(chosen, _Limits.of([sequences[row] for row in filtered], chosen))
    if probabilities.device.type == "cpu":
        rows = zip(probabilities.numpy(), thresholds.flatten().tolist(), uniforms_N.tolist(), strict=True)
        return torch.tensor([_draw_row(*row) for row in rows])
    probabilities = probabilities.masked_fill(probabilities < thresholds, 0.0)
    # float64: rounding in a float32 sum over 10^5 tokens is as large as the probability of a rare one.
    cumulative = probabilities.cumsum(dim=-1, dtype=torch.float64)
    total = cumulative[:, -1:]
    target = uniforms_N.to(logits_NV.device).unsqueeze(1) * total
    target = torch.minimum(target, torch.nextafter(total, torch.zeros_like(total)))
    tokens = torch.searchsorted(cumulative, target, right=True).squeeze(1)
    return tokens.clamp_(max=logits_NV.shape[-1] - 1)  # rows of NaN are out of range; they are reported as unusable


def _draw_row(probabilities_V: NDArray[np.float32], threshold: float, uniform: float) -> int:
    """The same for one row, without adding up the whole row where the filters leave little of it."""
    kept = np.flatnonzero(probabilities_V >= threshold) if threshold else np.arange(len(probabilities_V))
    if not len(kept):
        return len(probabilities_V) - 1  # a row of NaN
    # torch adds up faster than NumPy.
    cumulative = torch.from_numpy(probabilities_V[kept]).cumsum(dim=0, dtype=torch.float64).numpy()
    target = min(uniform * cumulative[-1], np.nextafter(cumulative[-1], 0.0))
    return int(kept[min(int(np.searchsorted(cumulative, target, side="right")), len(kept) - 1)])


@dataclass(frozen=True)
class _Limits:
    """top_k (huge for off), top_p and min_p as columns [N, 1]."""

    top_k: Tensor
    top_p: Tensor
    min_p: Tensor

    @staticmethod
    def of(sequences: SequenceOf[Sequence], like: Tensor) -> "_Limits":
        params = [sequence.params for sequence in sequences]
        vocab_size = like.shape[-1]
        return _Limits(
            top_k=_column([min(p.top_k, vocab_size) if p.top_k > 0 else vocab_size for p in params], like),
            top_p=_column([p.top_p for p in params], like),
            min_p=_column([p.min_p for p in params], like),
        )

    def rows(self, chosen: Tensor) -> "_Limits":
        return _Limits(self.top_k[chosen], self.top_p[chosen], self.min_p[chosen])


def _thresholds(probabilities_NV: Tensor, limits: _Limits) -> Tensor:
    """Smallest probability [N, 1] that survives the filters. Ties with it survive too: no sort order matters."""
    vocab_size = probabilities_NV.shape[-1]
    num_candidates = min(NUM_CANDIDATES, vocab_size)
    candidates = probabilities_NV.topk(num_candidates, dim=-1).values
    threshold, is_enough = _threshold_of_sorted(candidates, limits, vocab_size)
    rest = torch.nonzero(~is_enough).squeeze(1)
    if rest.numel():
        everything = _sort_descending(_without_tails(probabilities_NV[rest], limits.rows(rest)))
        threshold[rest] = _threshold_of_sorted(everything, limits.rows(rest), vocab_size)[0]
    return threshold


def _without_tails(probabilities_NV: Tensor, limits: _Limits) -> Tensor:
    """The candidates of rows that top_p alone cuts: the unlikely tokens that it leaves out for certain are left out.

    Tokens below (1 - top_p) / V have less than 1 - top_p together; half of that leaves room for rounding. On the CPU
    thousands of tokens are sorted instead of all, one row after the other; elsewhere a sort costs little.
    """
    num_rows, vocab_size = probabilities_NV.shape
    is_cut = bool(((limits.min_p > 0) | (limits.top_k < vocab_size)).any())
    if probabilities_NV.device.type != "cpu" or is_cut:
        return probabilities_NV
    is_candidate_NV = probabilities_NV >= (1 - limits.top_p) / (2 * vocab_size)
    counts = is_candidate_NV.sum(dim=-1)
    result = torch.zeros(num_rows, int(counts.max()))
    result[torch.arange(result.shape[-1]) < counts.unsqueeze(1)] = probabilities_NV[is_candidate_NV]
    return result


def _sort_descending(values_NV: Tensor) -> Tensor:
    if values_NV.device.type != "cpu":
        return values_NV.sort(dim=-1, descending=True).values
    # NumPy again: values alone sort with vector instructions, 1.0 against 3.8 milliseconds for a row of 49152.
    return torch.from_numpy(np.sort(values_NV.numpy(), axis=-1)[:, ::-1].copy())


def _threshold_of_sorted(sorted_NC: Tensor, limits: _Limits, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Thresholds [N, 1] from the C most likely tokens, and whether C were enough to know it [N]."""
    num_candidates = sorted_NC.shape[-1]
    rank = torch.arange(num_candidates, device=sorted_NC.device)
    keep = (sorted_NC >= limits.min_p * sorted_NC[:, :1]) & (rank < limits.top_k)
    is_cut = (limits.min_p > 0) | (limits.top_k < vocab_size)
    kept = torch.where(keep, sorted_NC, 0.0)
    # top_p is a share of what min_p and top_k leave; without them the softmax sums to one.
    mass = torch.where(is_cut, kept.sum(dim=-1, keepdim=True), 1.0)
    before = kept.cumsum(dim=-1) - kept
    final = keep & ((before < limits.top_p * mass) | (limits.top_p >= 1.0))
    num_cut = torch.where(is_cut, keep.sum(dim=-1, keepdim=True), final.sum(dim=-1, keepdim=True))
    is_enough = (num_cut < num_candidates) | (num_candidates == vocab_size)
    last = final.sum(dim=-1, keepdim=True) - 1
    return sorted_NC.gather(-1, last.clamp(min=0)), is_enough.squeeze(1)


def _logprobs(
    raw_RV: Tensor, token_ids: list[int | None], sequences: SequenceOf[Sequence]
) -> list[dict[int, Logprob] | None]:
    """Log-probabilities under the model itself, before penalties and temperature."""
    result: list[dict[int, Logprob] | None] = [None] * len(sequences)
    wanted = [
        (row, token_id, sequence.params.logprobs)
        for row, (sequence, token_id) in enumerate(zip(sequences, token_ids, strict=True))
        if sequence.params.logprobs is not None and token_id is not None
    ]
    if wanted:
        rows, tokens, counts = map(list, zip(*wanted, strict=True))
        for row, entry in zip(rows, token_logprobs(raw_RV[rows], tokens, counts), strict=True):
            result[row] = entry
    return result


@torch.inference_mode()
def token_logprobs(raw_RV: Tensor, token_ids: SequenceOf[int], counts: SequenceOf[int]) -> list[dict[int, Logprob]]:
    """Per row, the log-probability of its token, which comes first, and of the `counts` most likely ones."""
    entries = []
    for start in range(0, len(token_ids), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        logprobs = torch.log_softmax(raw_RV[rows].float(), dim=-1)
        chosen = torch.tensor(token_ids[rows], device=raw_RV.device).unsqueeze(1)
        own = logprobs.gather(-1, chosen)
        ranks = (logprobs > own).sum(dim=-1) + 1
        top = logprobs.topk(min(max(counts[rows]), logprobs.shape[-1]), dim=-1)
        columns = (chosen.squeeze(1), own.squeeze(1), ranks, top.indices, top.values)
        for count, token, value, rank, ids, values in zip(
            counts[rows], *(column.tolist() for column in columns), strict=True
        ):
            entry = {token: Logprob(value, rank)}
            for at in range(min(count, len(ids))):
                entry.setdefault(ids[at], Logprob(values[at], at + 1))
            entries.append(entry)
    return entries
