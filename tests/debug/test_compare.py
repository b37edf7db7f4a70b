"""Differences between logits: by hand, at the edges, and with ties."""

import math

import pytest
import torch

from autodeploy.debug.compare import difference, relative_error


def test_by_hand() -> None:
    reference, result = torch.tensor([[0.0, 2.0], [4.0, 0.0]]), torch.tensor([[0.0, 2.0], [0.0, 1.0]])
    found = difference(result, reference)
    assert found.relative_error == 1.0
    assert found.top_1_agreement == 0.5
    p, q = torch.softmax(reference[1], 0), torch.softmax(result[1], 0)
    assert found.kl_divergence == pytest.approx(float((p * (p / q).log()).sum()) / 2, rel=1e-5)


def test_the_same_is_no_difference() -> None:
    logits = torch.randn(5, 7)
    found = difference(logits, logits.clone())
    assert (found.relative_error, found.kl_divergence, found.top_1_agreement) == (0.0, 0.0, 1.0)


def test_a_tie_of_the_reference_says_nothing_about_the_best_token() -> None:
    assert difference(torch.tensor([[1.0, 1.00001]]), torch.tensor([[1.00001, 1.0]])).top_1_agreement == 1.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_on_one_side_only_is_infinitely_far(bad: float) -> None:
    logits = torch.tensor([[1.0, bad]])
    assert relative_error(logits, torch.ones(1, 2)) == math.inf
    assert relative_error(torch.ones(1, 2), logits) == math.inf
    assert relative_error(logits, logits) == 0.0
    assert relative_error(torch.ones(1, 3), torch.ones(1, 2)) == math.inf
