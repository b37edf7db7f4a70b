"""Log-probabilities: rows of logits and the tokens chosen go in, what the model thought of them comes out.

They are of the model itself, before penalties and temperature.

Shapes: V vocabulary, R rows of logits, K most likely tokens.
"""

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass

import torch
from torch import Tensor

from autodeploy.runtime.batch import Batch
from autodeploy.runtime.draw import on_device
from autodeploy.runtime.request import Logprob

ROWS_AT_ONCE, ROWS_AT_ONCE_ON_CPU = 64, 8
"""Rows whose log-probabilities are computed together: all those of a prompt or of a crowd would be copies of all their
logits, memory that comes and goes with every step."""


@dataclass(frozen=True)
class LogprobRows:
    """Log-probabilities that are computed and not looked at yet.

    Attributes:
        counts: most likely tokens wanted of each row.
        columns: per row, its token, that one's log-probability and rank, the most likely tokens and theirs.
    """

    counts: SequenceOf[int]
    columns: tuple[Tensor, ...]

    @staticmethod
    @torch.inference_mode()
    def of(raw_RV: Tensor, tokens_R: Tensor, rows: SequenceOf[int] | None, counts: SequenceOf[int]) -> "LogprobRows":
        """Of rows of logits of any float dtype with a token each.

        Args:
            rows: which of them, at least one; None takes all.
            counts: of these rows.
        """
        parts = []
        numbers = None if rows is None else on_device(rows, tokens_R)
        at_once = ROWS_AT_ONCE_ON_CPU if raw_RV.is_cpu else ROWS_AT_ONCE
        for first in range(0, len(counts), at_once):
            some: slice | Tensor = slice(first, first + at_once)
            if numbers is not None:
                some = numbers[some]
            logprobs, tokens = torch.log_softmax(raw_RV[some].float(), dim=-1), tokens_R[some]
            own = logprobs.gather(-1, tokens.unsqueeze(1))
            ranks = (logprobs > own).sum(dim=-1) + 1
            top = logprobs.topk(min(max(counts), logprobs.shape[-1]), dim=-1)
            parts.append((tokens, own.squeeze(1), ranks, top.indices, top.values))
        return LogprobRows(counts, tuple(torch.cat(column) for column in zip(*parts, strict=True)))

    def read(self) -> list[dict[int, Logprob]]:
        """Per row, the log-probability of its token, which comes first, and of the most likely ones."""
        entries = []
        columns = (column.tolist() for column in self.columns)
        for count, token, value, rank, ids, values in zip(self.counts, *columns, strict=True):
            entry = {token: Logprob(value, rank)}
            for at in range(min(count, len(ids))):
                entry.setdefault(ids[at], Logprob(values[at], at + 1))
            entries.append(entry)
        return entries


def note_prompt_logprobs(batch: Batch, logits_RV: Tensor | None) -> None:
    """Keep what the rows behind the sampled ones say of their prompts; a recomputed prompt says it anew.

    Args:
        logits_RV: those of the batch; None where it has no such rows.
    """
    if logits_RV is None:
        return
    at = batch.num_sampled_rows
    for sequence, first, count in batch.prompt_rows:
        token_ids = sequence.token_ids[first + 1 : first + 1 + count]
        wanted = [sequence.params.prompt_logprobs or 0] * count
        tokens_R = on_device(token_ids, logits_RV, torch.int64)
        of_prompt = LogprobRows.of(logits_RV[at : at + count], tokens_R, None, wanted)
        sequence.prompt_logprobs[first + 1 :] = of_prompt.read()
        at += count
