"""What a sequence may say next: logits go in, logits with biases, and -inf for what is ruled out, come out.

Shapes: V vocabulary, R rows of logits.
"""

import logging
from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from autodeploy.errors import InvalidRequestError
from autodeploy.runtime.draw import on_device
from autodeploy.runtime.grammar import GrammarCompiler, Matcher
from autodeploy.runtime.request import SamplingParams, Sequence
from autodeploy.runtime.structured_outputs import PARAMETER

logger = logging.getLogger(__name__)

RULED_OUT = "what the request asks of its output rules out every token; let some of it go"
"""The problem of constraints that contradict each other, which may show only after some tokens."""

TOO_COMPLEX = (
    "the output cannot be followed any further by what the request asks of it, which is too complex; simplify it"
)
"""The problem of a grammar whose places grow beyond the limits, which shows only at such a place."""

FAULTS_OF_REQUESTS = (RULED_OUT, TOO_COMPLEX)


class Constraints:
    """Biases, allowed tokens, bad words, minimum length, grammars. Keeps a matcher per guided sequence.

    Args:
        grammars: None serves no structured output.
    """

    def __init__(self, grammars: GrammarCompiler | None = None):
        self._grammars = grammars
        self._matchers: dict[Sequence, Matcher] = {}

    def check(self, params: SamplingParams) -> None:
        """Raises InvalidRequestError for what would fail at the first token."""
        if params.structured_outputs is None:
            return
        if self._grammars is None:
            raise InvalidRequestError("structured output needs a tokenizer, and there is none", PARAMETER)
        self._grammars.matcher(params.structured_outputs)

    def apply(self, logits_RV: Tensor, sequences: SequenceOf[Sequence]) -> Tensor:
        """What `SamplingParams` says of the next token of each row. The argument is left as it is.

        A row in which nothing is left is all -inf.
        """
        rows = [row for row, sequence in enumerate(sequences) if sequence.params.has_constraints]
        if not rows:
            return logits_RV
        result_RV = logits_RV.clone()
        for row in rows:
            sequence = sequences[row]
            _constrain_row(result_RV[row], sequence)
            if sequence.params.structured_outputs is not None:
                allowed = torch.from_numpy(self._matcher_of(sequence).allowed()[: logits_RV.shape[1]])
                result_RV[row].masked_fill_(~allowed.to(logits_RV.device), -torch.inf)
        return result_RV

    def problem(self, sequence: Sequence, vocab_size: int) -> str | None:
        """Why the sequence may say nothing next, whatever its logits are; None where that is not so."""
        matcher = self._matchers.get(sequence)
        if matcher is not None and matcher.problem is not None:
            logger.warning("a grammar ended its output: %s", matcher.problem)
            return TOO_COMPLEX
        is_open = self.apply(torch.zeros(1, vocab_size), [sequence]).isfinite().any()
        return None if is_open else RULED_OUT

    def release(self, sequence: Sequence) -> None:
        """Forget a finished sequence. A preempted one keeps its place in its grammar."""
        self._matchers.pop(sequence, None)

    def grammar_allows(self, sequence: Sequence, token_id: int) -> bool:
        """Whether a guided sequence may go on with this token."""
        return self._matcher_of(sequence).allows(token_id)

    def _matcher_of(self, sequence: Sequence) -> Matcher:
        """Of a guided sequence, at its latest token."""
        matcher = self._matchers.get(sequence)
        if matcher is None:
            if self._grammars is None or sequence.params.structured_outputs is None:
                raise ValueError("a guided sequence that was not checked")
            matcher = self._matchers[sequence] = self._grammars.matcher(sequence.params.structured_outputs)
        matcher.follow(sequence.token_ids[sequence.num_prompt_tokens :])
        return matcher


def _constrain_row(logits_V: Tensor, sequence: Sequence) -> None:
    params = sequence.params
    if params.logit_bias:
        token_ids, biases = zip(*params.logit_bias.items(), strict=True)
        logits_V.index_add_(0, on_device(token_ids, logits_V, torch.int64), on_device(biases, logits_V))
    if params.allowed_token_ids is not None:
        allowed = on_device(params.allowed_token_ids, logits_V, torch.int64)
        kept = logits_V[allowed]
        logits_V.fill_(-torch.inf)
        logits_V[allowed] = kept
    forbidden = _ends_of_bad_sequences(sequence)
    if sequence.num_tokens - sequence.num_prompt_tokens < params.min_tokens:
        forbidden |= sequence.stop_ids
    if forbidden:
        logits_V.index_fill_(0, on_device(sorted(forbidden), logits_V, torch.int64), -torch.inf)


def _ends_of_bad_sequences(sequence: Sequence) -> set[int]:
    """Last tokens of the bad sequences whose other tokens have just been generated."""
    output = sequence.token_ids[sequence.num_prompt_tokens :] if sequence.params.bad_token_sequences else []
    return {
        bad[-1]
        for bad in sequence.params.bad_token_sequences or ()
        if len(bad) <= len(output) + 1 and list(bad[:-1]) == output[len(output) + 1 - len(bad) :]
    }
