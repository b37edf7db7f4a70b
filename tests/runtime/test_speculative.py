"""What n-gram lookup drafts: what followed the longest match, the latest of those, continued as if the text repeats."""

from random import Random

import pytest

from autodeploy.config import SpeculativeOptions
from autodeploy.runtime.request import Limits, Request, SamplingParams, Sequence
from autodeploy.runtime.speculative import NgramProposer, may_speculate


def make_sequence(token_ids: list[int]) -> Sequence:
    return Sequence(Request("r", token_ids, SamplingParams(), 0), 0, Limits(1000, 1000))


def propose(token_ids: list[int], count: int = 4, **options: int) -> list[int]:
    sequence = make_sequence(token_ids)
    return NgramProposer(SpeculativeOptions(**options)).propose({sequence: count}).get(sequence, [])


@pytest.mark.parametrize(
    ("token_ids", "drafts"),
    [
        ([1, 2, 3, 4, 5, 9, 1, 2], [3, 4, 5, 9]),
        ([1, 2, 3, 9, 1, 2, 4, 9, 1, 2], [4, 9, 1, 2]),  # of equal matches the latest
        ([7, 1, 2, 3, 9, 8, 1, 2, 4, 9, 7, 1, 2], [3, 9, 8, 1]),  # a longer match counts more
        ([5, 6, 5, 6, 5], [6, 5, 6, 5]),  # goes on as if the text repeats
        ([8, 8, 8], [8, 8, 8, 8]),
        ([1, 2, 3, 4], []),
        ([1, 9, 2, 1], []),  # one token alone is no match
        ([1], []),
    ],
)
def test_drafts(token_ids: list[int], drafts: list[int]) -> None:
    assert propose(token_ids) == drafts


def test_counts_and_lengths_of_matches_are_options() -> None:
    assert propose([1, 2, 3, 9, 1, 2], count=2) == [3, 9]
    assert propose([1, 9, 2, 1], prompt_lookup_min=1) == [9, 2, 1, 9]
    text = [7, 1, 2, 3, 9, 8, 1, 2, 4, 9, 7, 1, 2]
    assert propose(text, prompt_lookup_max=2) == [4, 9, 7, 1]
    assert propose([1, 2, 3, 9, 1, 2], prompt_lookup_min=3) == []


def test_a_growing_sequence_drafts_what_a_whole_one_does() -> None:
    random = Random(1)
    proposer = NgramProposer(SpeculativeOptions())
    growing = make_sequence([1])
    for _ in range(300):
        growing.token_ids.append(random.randrange(3))
        assert proposer.propose({growing: 5}).get(growing, []) == propose(growing.token_ids, 5)
    proposer.release(growing)
    proposer.release(growing)
    assert proposer.propose({growing: 5}) != {}


def test_only_a_sequence_with_one_token_to_compute_speculates() -> None:
    sequence = make_sequence([1, 2, 3])
    sequence.num_computed_tokens = 2
    assert not may_speculate(sequence), "it waits"
    sequence.slot = 1
    assert may_speculate(sequence)
    sequence.num_computed_tokens = 1
    assert not may_speculate(sequence)
