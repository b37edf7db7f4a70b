"""Verification of drafts: one step's logits go in, the tokens that sequences go on with come out.

A sequence with drafts d_1 .. d_k has k + 1 rows of logits: behind its last token, and behind each draft. The token
behind its last one is sampled as ever. If it happens to be d_1, the row behind d_1 is the row behind the sequence's new
last token, and the next token is sampled from it; and so on until a token is not the draft, or there are no more.

So every token comes from the distribution that it would come from without drafts, given the tokens before it. A draft
is accepted with the probability that the model gives it, as in rejection sampling (Leviathan et al., 2023, section 2.3)
with a point mass for the draft's distribution. Penalties, minimum lengths, grammars and seeds see one token after the
other and do not know of drafts: with a seed, the tokens are those without drafts.

A random number depends on seed and position only, so where neither penalties nor constraints look at the token before,
all rows may be chosen from at once, and the drafts compared with what was chosen, on the device.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from autodeploy.runtime.batch import Batch
from autodeploy.runtime.draw import on_device
from autodeploy.runtime.request import Logprob, Sequence
from autodeploy.runtime.sampler import Choice, Sampler


@dataclass(slots=True)
class Extension:
    """What one step added to a sequence.

    Attributes:
        first_row: of the logits.
        token_ids, logprobs: the new tokens, already appended to the sequence.
        is_usable: False when a row of logits allowed no token; the sequence has not ended yet.
        goes_on: the row behind the last of the tokens is of use.
    """

    sequence: Sequence
    first_row: int
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[dict[int, Logprob]] = field(default_factory=list)
    is_usable: bool = True
    goes_on: bool = True

    @property
    def num_accepted(self) -> int:
        """Drafts that were sampled: those whose states are those of the sequence."""
        return max(0, len(self.token_ids) - 1)

    def append(self, token_id: int | None, logprobs: dict[int, Logprob] | None) -> None:
        """Add the token sampled from the next row."""
        if token_id is None:
            self.is_usable = self.goes_on = False
            return
        self.sequence.append(token_id)
        self.token_ids.append(token_id)
        if logprobs is not None:
            self.logprobs.append(logprobs)
        is_draft = self.sequence.draft_token_ids[len(self.token_ids) - 1 : len(self.token_ids)] == [token_id]
        self.goes_on = is_draft and self.sequence.finish_reason is None


@torch.inference_mode()
def choose_at_once(sampler: Sampler, logits_RV: Tensor, sequences: SequenceOf[Sequence]) -> Choice | None:
    """A token for every row of sequences with drafts, and how many drafts they bear out, without a wait for the device.

    None where a row needs the token before it, for a penalty or a constraint; and where drawing costs time of the host,
    which is better spent on rows that are needed.
    """
    if sampler.draws_one_by_one(logits_RV):
        return None
    if not all(sequence.is_unconstrained for sequence in sequences):
        return None
    owners: list[Sequence] = []
    offsets: list[int] = []
    drafts: list[int] = []
    starts = [0]
    for sequence in sequences:
        num_rows = 1 + len(sequence.draft_token_ids)
        owners += [sequence] * num_rows
        offsets += range(num_rows)
        drafts += [*sequence.draft_token_ids, -1]
        starts.append(len(drafts))
    choice = sampler.choose(logits_RV, owners, offsets=offsets)
    numbers = on_device(drafts + starts, choice.tokens_R)
    accepted_S = sampler.accept_drafts(choice.tokens_R, numbers[: len(drafts)], numbers[len(drafts) :])
    return replace(choice, accepted_S=accepted_S)


def extend_by_choice(choice: Choice, accepted_S: Tensor, sequences: SequenceOf[Sequence]) -> list[Extension]:
    """Append what `choose_at_once` chose for sequences with drafts."""
    samples = choice.read()
    extensions = []
    first_row = 0
    for sequence, count in zip(sequences, accepted_S.tolist(), strict=True):
        extension = Extension(sequence, first_row)
        extensions.append(extension)
        first_row += 1 + len(sequence.draft_token_ids)
        for row in range(extension.first_row, extension.first_row + 1 + count):
            extension.append(samples.token_ids[row], samples.logprobs[row])
            if not extension.is_usable or sequence.finish_reason is not None:
                break
    return extensions


def extend_sequences(sampler: Sampler, logits_RV: Tensor, batch: Batch) -> list[Extension]:
    """Sample the next tokens of `batch.sampled`, in its order, and append them."""
    extensions = []
    first_row = 0
    for sequence in batch.sampled:
        extensions.append(Extension(sequence, first_row))
        first_row += 1 + len(sequence.draft_token_ids)
    growing = extensions
    while growing:
        _sample_next(sampler, logits_RV, growing)
        growing = [extension for extension in growing if extension.goes_on]
    return extensions


def _sample_next(sampler: Sampler, logits_RV: Tensor, growing: SequenceOf[Extension]) -> None:
    """One token for each; where the choice needs nothing but a row of logits, as many as there may be."""
    rows: list[int] = []
    owners: list[Extension] = []
    for extension in growing:
        row = extension.first_row + len(extension.token_ids)
        count = 1 + len(extension.sequence.draft_token_ids) if extension.sequence.is_plain else 1
        rows += range(row, row + count)
        owners += [extension] * count
    chosen_RV = logits_RV if len(rows) == len(logits_RV) else logits_RV[rows]
    samples = sampler.sample(chosen_RV, [extension.sequence for extension in owners])
    for extension, token_id, logprobs in zip(owners, samples.token_ids, samples.logprobs, strict=True):
        if extension.goes_on:
            extension.append(token_id, logprobs)
