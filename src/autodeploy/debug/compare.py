"""How far two results are apart: logits `[tokens, V]` go in, a few numbers come out.

They say the same for a transform against the graph before it, for a backend, and for numbers of lower precision
against float32.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

TOP_1_MARGIN = 1e-3
"""Two best logits this close, as a share of the largest, are a tie: which one is first says nothing."""


@dataclass(frozen=True, kw_only=True)
class Difference:
    """A result against a reference.

    Attributes:
        relative_error: largest difference of a logit, as a share of the reference's largest; infinite where only one of
            the two is finite.
        kl_divergence: mean over tokens of KL(reference || result), in nats.
        top_1_agreement: share of tokens whose most likely next token is the same; ties of the reference left out.
    """

    relative_error: float
    kl_divergence: float
    top_1_agreement: float


def difference(result: Tensor, reference: Tensor) -> Difference:
    """Compare logits `[tokens, V]` with those of a reference."""
    expected, found = (torch.log_softmax(logits.double(), dim=-1) for logits in (reference, result))
    kl = (expected.exp() * (expected - found)).sum(-1).mean()
    best = reference.topk(min(2, reference.shape[-1]), dim=-1).values
    decided = best[:, 0] - best[:, -1] > TOP_1_MARGIN * reference.abs().max()
    same = (result.argmax(-1) == reference.argmax(-1))[decided]
    return Difference(
        relative_error=relative_error(result, reference),
        kl_divergence=max(0.0, float(kl)),
        top_1_agreement=float(same.double().mean()) if len(same) else 1.0,
    )


def relative_error(result: Tensor, reference: Tensor) -> float:
    """Largest absolute difference as a share of the reference's largest magnitude."""
    if result.shape != reference.shape or not torch.equal(result.isfinite(), reference.isfinite()):
        return float("inf")
    finite = reference.isfinite()
    if not bool(finite.any()):
        return 0.0
    scale = reference[finite].abs().max().double().clamp_min(1e-6)
    return float((result[finite].double() - reference[finite].double()).abs().max() / scale)
