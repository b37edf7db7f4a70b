"""Agreement: logits of a run and of the reference along one text go in; how far they go together comes out.

Greedy decoding need not be run twice to be compared: as long as the reference, shown what was generated, would have
chosen each of the tokens, it would have generated them.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

_ROWS = 64
"""positions compared at a time, in double precision"""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """A run against the float32 reference along one text.

    Attributes:
        num_equal_tokens: greedy tokens before the first that the reference would not have chosen.
        first_margin: by how much the reference prefers its own token there, in nats; None when all are equal.
        num_positions: positions of the text that were compared.
        num_same_choice: those where the most likely next token is the same.
        worst_margin: the largest preference of the reference at a position where another token was chosen, in nats.
        kl_mean: mean over positions of KL(reference || run), in nats.
        kl_max: the largest of them.
        largest_error: largest difference of a logit.
        largest_logit: largest magnitude of the reference's logits.
    """

    num_equal_tokens: int
    first_margin: float | None
    num_positions: int
    num_same_choice: int
    worst_margin: float
    kl_mean: float
    kl_max: float
    largest_error: float
    largest_logit: float

    @property
    def top_1(self) -> float:
        """Share of positions whose most likely next token is the same."""
        return self.num_same_choice / self.num_positions


def agreement(found: Tensor, reference: Tensor, num_new_tokens: int, chosen: Tensor | None = None) -> Agreement:
    """Compare logits `[T, V]` of a run with those of the reference.

    Args:
        num_new_tokens: so many of the last positions are those that generated tokens were chosen at.
        chosen: the tokens that were generated; default: the run's most likely ones.
    """
    parts = [_compare(*rows) for rows in zip(found.split(_ROWS), reference.split(_ROWS), strict=True)]
    kl, margins, choices, errors = (torch.cat(values) for values in zip(*parts, strict=True))
    last = slice(len(found) - num_new_tokens, len(found))
    best = reference[last].argmax(-1)
    chosen = choices[last] if chosen is None else chosen
    equal = sum(1 for _ in itertools.takewhile(bool, (chosen == best).tolist()))
    first_margin = None
    if equal < num_new_tokens:
        row = reference[last][equal].double()
        first_margin = float(row.max() - row[int(chosen[equal])])
    return Agreement(
        num_equal_tokens=equal,
        first_margin=first_margin,
        num_positions=len(found),
        num_same_choice=int((choices == reference.argmax(-1)).sum()),
        worst_margin=max(float(margins.max()), first_margin or 0.0),
        kl_mean=float(kl.mean()),
        kl_max=float(kl.max()),
        largest_error=float(errors.max()),
        largest_logit=float(reference.abs().max()),
    )


def _compare(found: Tensor, reference: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For each position: KL, the reference's preference for its own choice over the run's, that, and the largest error.

    What is not finite in one of the two only comes out as NaN, which passes no limit.
    """
    reference, found = reference.double(), found.double()
    expected, result = reference.log_softmax(-1), found.log_softmax(-1)
    terms = torch.where(expected.isneginf(), 0.0, expected.exp() * (expected - result))
    choice = found.argmax(-1)
    margin = reference.max(-1).values - reference.gather(-1, choice[:, None])[:, 0]
    both_excluded = (reference == found) & reference.isinf()
    error = torch.where(both_excluded, 0.0, (found - reference).abs()).max(-1).values
    return terms.sum(-1).clamp_min(0.0), margin, choice, error
