"""agreement: the figures are those of plain loops, and what is not finite passes no limit."""

import math

import torch

from autodeploy.debug.agreement import agreement


def _logits(*shape: int, seed: int) -> torch.Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_figures_are_those_of_plain_loops() -> None:
    reference = _logits(150, 11, seed=0)  # more positions than are compared at a time
    found = reference + 0.3 * _logits(150, 11, seed=1)
    result = agreement(found, reference, num_new_tokens=20)
    kl, margins = [], []
    for row, other in zip(reference.double(), found.double(), strict=True):
        p, q = row.softmax(0), other.softmax(0)
        kl.append(float((p * (p / q).log()).sum()))
        margins.append(float(row.max() - row[other.argmax()]))
    assert math.isclose(result.kl_mean, sum(kl) / 150, rel_tol=1e-9)
    assert math.isclose(result.kl_max, max(kl), rel_tol=1e-9)
    assert math.isclose(result.worst_margin, max(margins), rel_tol=1e-9)
    assert result.num_same_choice == margins.count(0.0) < 150 == result.num_positions
    assert math.isclose(result.largest_error, float((found.double() - reference.double()).abs().max()))
    assert result.largest_logit == float(reference.abs().max())
    first = next(at for at, margin in enumerate(margins[-20:]) if margin)
    assert result.num_equal_tokens == first and math.isclose(result.first_margin or 0.0, margins[130 + first])


def test_generated_tokens_count_until_the_first_that_the_reference_would_not_choose() -> None:
    reference = torch.zeros(5, 4)
    reference[:, 2] = 1.0
    reference[:, 1] = 0.75
    same = agreement(reference, reference, 3, torch.tensor([2, 2, 2]))
    assert (same.num_equal_tokens, same.first_margin, same.worst_margin, same.top_1) == (3, None, 0.0, 1.0)
    other = agreement(reference, reference, 3, torch.tensor([2, 1, 0]))
    assert (other.num_equal_tokens, other.first_margin, other.worst_margin) == (1, 0.25, 0.25)


def test_tokens_that_both_exclude_are_no_difference() -> None:
    reference = torch.tensor([[1.0, 2.0, -torch.inf]])
    result = agreement(reference, reference, 1)
    assert (result.kl_mean, result.largest_error) == (0.0, 0.0)


def test_what_is_not_finite_is_no_small_number() -> None:
    reference = torch.tensor([[1.0, 2.0, 3.0]])
    assert math.isnan(agreement(torch.full((1, 3), torch.nan), reference, 1).kl_mean)
    assert agreement(torch.tensor([[1.0, 2.0, -torch.inf]]), reference, 1).kl_mean == math.inf
