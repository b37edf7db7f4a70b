"""What a sequence may say next: logits go in, logits with biases, and -inf for what is ruled out, come out.

Shapes: V vocabulary, R rows of logits.
"""

from collections.abc import Sequence as SequenceOf

import torch
from torch import Tensor

from autodeploy.runtime.request import Sequence


def constrain(logits_RV: Tensor, sequences: SequenceOf[Sequence]) -> Tensor:
    """Biases, allowed tokens, bad words, minimum length: what `SamplingParams` says of the next token of each row.

    The argument is left as it is. A row in which nothing is left is all -inf.
    """
    rows = [row for row, sequence in enumerate(sequences) if sequence.params.has_constraints]
    if not rows:
        return logits_RV
    result_RV = logits_RV.clone()
    for row in rows:
        _constrain_row(result_RV[row], sequences[row])
    return result_RV


def _constrain_row(logits_V: Tensor, sequence: Sequence) -> None:
    params = sequence.params
    if params.logit_bias:
        token_ids, biases = zip(*params.logit_bias.items(), strict=True)
        logits_V[list(token_ids)] += torch.tensor(biases, dtype=logits_V.dtype, device=logits_V.device)
    if params.allowed_token_ids is not None:
        allowed = list(params.allowed_token_ids)
        kept = logits_V[allowed]
        logits_V.fill_(-torch.inf)
        logits_V[allowed] = kept
    forbidden = _ends_of_bad_sequences(sequence)
    if sequence.num_output_tokens < params.min_tokens:
        forbidden |= sequence.stop_ids
    if forbidden:
        logits_V[sorted(forbidden)] = -torch.inf


def _ends_of_bad_sequences(sequence: Sequence) -> set[int]:
    """Last tokens of the bad sequences whose other tokens have just been generated."""
    output = sequence.token_ids[sequence.num_prompt_tokens :] if sequence.params.bad_token_sequences else []
    return {
        bad[-1]
        for bad in sequence.params.bad_token_sequences or ()
        if len(bad) <= len(output) + 1 and list(bad[:-1]) == output[len(output) + 1 - len(bad) :]
    }
