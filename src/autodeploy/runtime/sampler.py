"""Sampling: logits and the sequences they belong to go in, one token per row and its log-probabilities come out.

The order is: penalties, constraints, temperature, min-p, top-k, top-p, then one random number per row through the
cumulative distribution. Every row depends on its own logits, parameters and random number only, never on its neighbours
in the batch; the random number depends on the seed and the token's position only, and is the same on every device. On
the CPU rows are drawn one by one (`draw.py`), elsewhere all at once by the op `choose_tokens`.

Choosing and looking at what was chosen are two things: between them the device may still be at work. A step may have
chosen already, in its CUDA graph, by what `draws` gave it.

Shapes: V vocabulary, R rows of logits.
"""

import math
import secrets
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autodeploy.compile.program import AcceptDrafts, ChooseTokens, Chosen, Draws
from autodeploy.ops.sampling import accept_drafts, as_int64, choose_tokens
from autodeploy.runtime.constraints import Constraints
from autodeploy.runtime.draw import draw, on_device
from autodeploy.runtime.grammar import GrammarCompiler
from autodeploy.runtime.logprobs import LogprobRows
from autodeploy.runtime.random_numbers import key_of, uniforms
from autodeploy.runtime.request import Logprob, Sequence

_MINUS_INFINITY_BITS = 0xFF80
"""Of bfloat16; greater ones, without a sign, are NaN."""


@dataclass(frozen=True)
class Samples:
    """Per row: the token, or None where the logits are unusable (NaN, +inf, all -inf); log-probabilities if asked."""

    token_ids: list[int | None]
    logprobs: list[dict[int, Logprob] | None]


@dataclass(frozen=True)
class Choice:
    """Tokens that are chosen, on the device, and may not be there yet.

    Attributes:
        tokens_R: int64; any token where the logits are unusable.
        best_R: the greatest logit of each row; not finite where the logits are unusable.
        logprob_rows: rows whose log-probabilities are asked for.
        logprobs: of those rows.
        accepted_S: int64, of rows behind drafts, how many drafts of each sequence were chosen.
        copied: on CUDA, when what `read` looks at is on the host.
    """

    tokens_R: Tensor
    best_R: Tensor
    logprob_rows: SequenceOf[int] = ()
    logprobs: LogprobRows | None = None
    accepted_S: Tensor | None = None
    copied: torch.cuda.Event | None = None

    def on_host(self) -> "Choice":
        """The same, on its way to the host: to be asked for at once, so that it does not wait for what comes later."""
        if self.tokens_R.device.type != "cuda":
            return self
        logprobs = self.logprobs
        if logprobs is not None:
            columns = tuple(column.to("cpu", non_blocking=True) for column in logprobs.columns)
            logprobs = replace(logprobs, columns=columns)
        tokens_R, best_R = (tensor.to("cpu", non_blocking=True) for tensor in (self.tokens_R, self.best_R))
        accepted_S = None if self.accepted_S is None else self.accepted_S.to("cpu", non_blocking=True)
        copied = torch.cuda.Event()
        copied.record(torch.cuda.current_stream(self.tokens_R.device))  # not of the device that is current
        return Choice(tokens_R, best_R, self.logprob_rows, logprobs, accepted_S, copied)

    def read(self) -> Samples:
        """The tokens themselves; waits until they are there."""
        if self.copied is not None:
            self.copied.synchronize()
        token_ids: list[int | None] = self.tokens_R.tolist()
        best = self.best_R.tolist()
        if not math.isfinite(sum(best)):  # in float64, where no sum of float32 numbers overflows
            token_ids = [token if math.isfinite(value) else None for token, value in zip(token_ids, best, strict=True)]
        logprobs: list[dict[int, Logprob] | None] = [None] * len(token_ids)
        if self.logprobs is not None:
            for row, entry in zip(self.logprob_rows, self.logprobs.read(), strict=True):
                logprobs[row] = None if token_ids[row] is None else entry
        return Samples(token_ids, logprobs)


@dataclass(eq=False)
class _History:
    """What the penalties need of one sequence's tokens, kept up to date token by token."""

    seen_V: Tensor
    output_counts_V: Tensor
    num_tokens: int = 0

    def update(self, sequence: Sequence, latest_R: Tensor | None) -> None:
        known = on_device(sequence.token_ids[self.num_tokens :], self.seen_V, torch.int64)
        self._add(known, max(0, sequence.num_prompt_tokens - self.num_tokens))
        self.num_tokens = sequence.num_tokens
        if sequence.pending_row is not None and latest_R is not None:
            self._add(latest_R[sequence.pending_row : sequence.pending_row + 1], 0)

    def _add(self, tokens: Tensor, num_prompt_tokens: int) -> None:
        self.seen_V.index_fill_(0, tokens, True)
        outputs = tokens[num_prompt_tokens:]
        self.output_counts_V.index_add_(0, outputs, torch.ones_like(outputs, dtype=torch.float32))


@dataclass(eq=False)
class Sampler:
    """Chooses tokens. Keeps a random key per random sequence and a token history per penalised one.

    Attributes:
        seed: sequences without a seed get theirs from this one and from when they came; None takes one from the system.
        grammars: compiles what guided sequences follow; None serves none.
        choose_tokens: the op of that name, or a kernel of it, for the program's logits; None takes the reference, and
            on the CPU what is faster than that.
        accept_drafts: the op of that name, or a kernel of it; used together with `choose_tokens`.
        constraints: what sequences may say next.
    """

    seed: int | None = None
    grammars: GrammarCompiler | None = None
    choose_tokens: ChooseTokens | None = None
    accept_drafts: AcceptDrafts = accept_drafts.reference
    constraints: Constraints = field(init=False)
    _key: int = field(init=False)
    _keys: dict[Sequence, int] = field(init=False, default_factory=dict)
    _histories: dict[Sequence, _History] = field(init=False, default_factory=dict)
    _drawn: tuple[list[Sequence], Draws, bool] | None = field(init=False, default=None)
    """sequences of some rows, their draws, and whether these rows have neither penalties nor constraints"""

    def __post_init__(self) -> None:
        self.constraints = Constraints(self.grammars)
        self._key = secrets.randbits(64) if self.seed is None else self.seed

    def release(self, sequence: Sequence) -> None:
        """Forget a finished sequence."""
        self._keys.pop(sequence, None)
        self._histories.pop(sequence, None)
        if self._drawn is not None and sequence in self._drawn[0]:
            self._drawn = None
        self.constraints.release(sequence)

    def sample(self, logits_RV: Tensor, sequences: SequenceOf[Sequence]) -> Samples:
        """One token for each row of `logits_RV` (any float dtype), whose sequences are given in the same order."""
        return self.choose(logits_RV, sequences).read()

    @torch.inference_mode()
    def choose(
        self,
        logits_RV: Tensor,
        sequences: SequenceOf[Sequence],
        latest_R: Tensor | None = None,
        offsets: SequenceOf[int] | None = None,
        chosen: Chosen | None = None,
    ) -> Choice:
        """The same without waiting for the device, unless a constraint needs to.

        Args:
            latest_R: the tokens that `Sequence.pending_row` means, on the device.
            offsets: how many tokens come between its sequence's last one and the token of each row; default: none.
            chosen: what the step has chosen by `draws` of these sequences.
        """
        if chosen is not None:
            return self._with_logprobs(*chosen, logits_RV, sequences)
        if logits_RV.is_cpu and all([each.is_plain for each in sequences]):
            return Choice(*self._best(logits_RV))
        if logits_RV.is_cpu and all(each.is_plain or each.is_plainly_guided for each in sequences):
            return self._best_allowed(logits_RV, sequences)
        raw_RV = logits_RV
        if not all([each.is_unconstrained for each in sequences]):
            penalised_RV = self._penalise(raw_RV.float(), sequences, latest_R)
            logits_RV = self.constraints.apply(penalised_RV, sequences)
        if self.draws_one_by_one(logits_RV):
            tokens_R, best_R = self._choose_one_by_one(logits_RV, sequences)
        else:
            tokens_R, best_R = self._choose_together(logits_RV, sequences, offsets or [0] * len(sequences))
        return self._with_logprobs(tokens_R, best_R, raw_RV, sequences)

    def draws(self, sequences: SequenceOf[Sequence], like: Tensor) -> Draws | None:
        """What a step that chooses tokens itself has to know; None where penalties or constraints change logits first.

        The same object while the sequences are the same.

        Args:
            like: a tensor of the device.
        """
        draws, is_free = self._draws(list(sequences), like)
        return draws if is_free else None

    def _with_logprobs(
        self, tokens_R: Tensor, best_R: Tensor, raw_RV: Tensor, sequences: SequenceOf[Sequence]
    ) -> Choice:
        wanted = [(row, s.params.logprobs) for row, s in enumerate(sequences) if s.params.logprobs is not None]
        if not wanted:
            return Choice(tokens_R, best_R)
        logprob_rows, counts = map(list, zip(*wanted, strict=True))
        return Choice(tokens_R, best_R, logprob_rows, LogprobRows.of(raw_RV, tokens_R, logprob_rows, counts))

    def draws_one_by_one(self, logits_RV: Tensor) -> bool:
        """Whether drawing from a row costs time of the host, as it does on the CPU."""
        return self.choose_tokens is None and logits_RV.is_cpu

    def _best_allowed(self, logits_RV: Tensor, sequences: SequenceOf[Sequence]) -> Choice:
        """Where the greatest logit of a row is of a token that its grammar allows, no other need be asked about."""
        tokens_R, best_R = self._best(logits_RV)
        guided = [row for row, sequence in enumerate(sequences) if sequence.is_plainly_guided]
        refused = [row for row in guided if not self.constraints.grammar_allows(sequences[row], int(tokens_R[row]))]
        if refused:
            left_RV = self.constraints.apply(logits_RV[refused], [sequences[row] for row in refused])
            tokens_R[refused], best_R[refused] = self._best(left_RV)
        return Choice(tokens_R, best_R)

    def _best(self, logits_RV: Tensor) -> tuple[Tensor, Tensor]:
        if self.choose_tokens is None:
            return _best(logits_RV)
        return self.choose_tokens(logits_RV, None, None, None, None, None, None)

    def _choose_one_by_one(self, logits_RV: Tensor, sequences: SequenceOf[Sequence]) -> tuple[Tensor, Tensor]:
        tokens_R, best_R = _best(logits_RV)
        random_rows = [row for row, sequence in enumerate(sequences) if not sequence.params.is_greedy]
        if not random_rows:
            return tokens_R, best_R
        chosen = [sequences[row] for row in random_rows]
        params = [sequence.params for sequence in chosen]
        keys, positions = map(self._key_of, chosen), (sequence.num_tokens for sequence in chosen)
        numbers = uniforms(keys, positions, len(chosen))
        if len(chosen) == len(sequences):
            return draw(logits_RV, best_R, params, numbers), best_R
        rows = torch.tensor(random_rows)
        tokens_R[rows] = draw(logits_RV[rows], best_R[rows], params, numbers)
        return tokens_R, best_R

    def _choose_together(
        self, logits_RV: Tensor, sequences: SequenceOf[Sequence], offsets: SequenceOf[int]
    ) -> tuple[Tensor, Tensor]:
        choose = self.choose_tokens or choose_tokens.reference
        if all(sequence.params.is_greedy for sequence in sequences):
            return choose(logits_RV, None, None, None, None, None, None)
        draws, _ = self._draws(list(sequences), logits_RV)
        temperature, top_p, min_p = draws.shares
        top_k, keys_R = draws.numbers
        counts = [s.num_tokens + offset for s, offset in zip(sequences, offsets, strict=True)]
        positions = on_device(counts, logits_RV, torch.int64)
        if draws.has_filters:
            return choose(logits_RV, temperature, top_k, top_p, min_p, keys_R, positions)
        return choose(logits_RV, temperature, None, None, None, keys_R, positions)

    def _draws(self, sequences: list[Sequence], like: Tensor) -> tuple[Draws, bool]:
        """Those of the rows of these sequences, and whether the rows have neither penalties nor constraints."""
        if self._drawn is not None and self._drawn[0] == sequences:
            return self._drawn[1:]
        params = [sequence.params for sequence in sequences]
        shares = [0.0 if p.is_greedy else p.temperature for p in params]
        shares += [p.top_p for p in params]
        shares += [p.min_p for p in params]
        numbers = [max(p.top_k, 0) for p in params]
        numbers += [0 if s.params.is_greedy else as_int64(self._key_of(s)) for s in sequences]
        draws = Draws(
            on_device(shares, like, torch.float32).view(3, len(params)),
            on_device(numbers, like, torch.int64).view(2, len(params)),
            any(p.top_k > 0 or p.top_p < 1.0 or p.min_p > 0.0 for p in params),
        )
        is_free = all(each.is_unconstrained for each in sequences)
        self._drawn = (sequences, draws, is_free)
        return draws, is_free

    def _penalise(self, logits_RV: Tensor, sequences: SequenceOf[Sequence], latest_R: Tensor | None = None) -> Tensor:
        """Repetition penalty over prompt and output, frequency and presence penalty over output."""
        penalised = [row for row, sequence in enumerate(sequences) if sequence.params.has_penalties]
        if not penalised:
            return logits_RV
        histories = [self._history(sequences[row], logits_RV, latest_R) for row in penalised]
        seen = torch.stack([history.seen_V for history in histories])
        counts = torch.stack([history.output_counts_V for history in histories])
        params = [sequences[row].params for row in penalised]
        rows = on_device(penalised, logits_RV, torch.int64)
        logits = logits_RV[rows]
        repetition, frequency, presence = (
            on_device([getattr(p, f"{name}_penalty") for p in params], logits).unsqueeze(1)
            for name in ("repetition", "frequency", "presence")
        )
        logits = torch.where(seen, torch.where(logits > 0, logits / repetition, logits * repetition), logits)
        logits = logits - frequency * counts
        logits = logits - presence * (counts > 0)
        return logits_RV.index_copy(0, rows, logits)

    def _history(self, sequence: Sequence, logits_RV: Tensor, latest_R: Tensor | None) -> _History:
        history = self._histories.get(sequence)
        if history is None:
            zeros = torch.zeros(logits_RV.shape[-1], dtype=torch.float32, device=logits_RV.device)
            history = self._histories[sequence] = _History(zeros.bool(), zeros)
        history.update(sequence, latest_R)
        return history

    def _key_of(self, sequence: Sequence) -> int:
        key = self._keys.get(sequence)
        if key is None:
            seed = sequence.params.seed
            own = (
                (seed + sequence.index,) if seed is not None else (self._key, sequence.request.arrival, sequence.index)
            )
            key = self._keys[sequence] = key_of(*own)
        return key


def _best(logits_RV: Tensor) -> tuple[Tensor, Tensor]:
    """The token with the greatest logit of each row, and that logit, on the CPU. A NaN counts as the greatest."""
    tokens_R = _best_by_bits(logits_RV)
    if tokens_R is None:
        # NumPy, because torch's CPU argmax is not vectorised: 5 against 75 microseconds for a row of 49152.
        tokens_R = torch.from_numpy(logits_RV.float().numpy().argmax(axis=-1))
    return tokens_R, logits_RV.gather(-1, tokens_R.unsqueeze(1)).squeeze(1)


def _best_by_bits(logits_RV: Tensor) -> Tensor | None:
    """Tokens [R] with the greatest logits in bfloat16, without a copy in float32; None where bits do not tell.

    The bits of positive numbers, as whole numbers, are ordered like these, NaN above infinity, and are greater than
    those of negative ones. So they tell if every row has a positive number, and no NaN has the sign bit.
    """
    if logits_RV.dtype != torch.bfloat16 or not logits_RV.numel():
        return None
    bits_RV = logits_RV.contiguous().view(torch.int16).numpy()
    tokens_R: NDArray[np.int64] = bits_RV.argmax(axis=-1)
    is_positive = np.take_along_axis(bits_RV, tokens_R[:, None], axis=-1).min() > 0
    if not is_positive or bits_RV.view(np.uint16).max() > _MINUS_INFINITY_BITS:
        return None
    return torch.from_numpy(tokens_R)
