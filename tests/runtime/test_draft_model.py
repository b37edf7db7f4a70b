"""A draft model keeps up with its sequences, shares the memory, and gives up quietly where it has no room."""

from typing import Any

import pytest

from autodeploy.compile.program import Program
from autodeploy.config import EngineOptions
from autodeploy.errors import ConfigError
from autodeploy.runtime.draft_model import DraftModel, draft_model_beside
from autodeploy.runtime.engine import Engine
from autodeploy.runtime.request import Limits, Request, SamplingParams, Sequence
from tests.runtime.toy import reference_tokens, toy_program

CONFIG = {"model": "toy", "num_speculative_tokens": 4}
LAYERS = ("full", "window", "slot")


def make_draft(draft: Program, **options: Any) -> tuple[DraftModel, EngineOptions]:
    chosen = EngineOptions(**{"page_size": 4, "max_num_seqs": 3, "speculative_config": CONFIG, **options})
    return draft_model_beside(toy_program(LAYERS), draft, chosen, 64)


def make_sequence(token_ids: list[int]) -> Sequence:
    return Sequence(Request("r", token_ids, SamplingParams(), 0), 0, Limits(1000, 1000))


@pytest.mark.parametrize("layers", [("full",), ("window",), ("slot",), LAYERS])
def test_drafts_are_the_draft_models_greedy_tokens_however_the_sequence_grows(layers: tuple[str, ...]) -> None:
    proposer, _ = make_draft(toy_program(layers))
    one, other = make_sequence([1, 2, 3]), make_sequence([4] * 9)
    for tokens in ([], [5], [6, 7, 8], reference_tokens(layers, [1, 2, 3, 5, 6, 7, 8], 3), [9]):
        one.token_ids += tokens
        other.token_ids += tokens[:1]
        drafts = proposer.propose({one: 4, other: 2})
        assert drafts == {
            one: reference_tokens(layers, one.token_ids, 4),
            other: reference_tokens(layers, other.token_ids, 2),
        }


def test_a_long_sequence_is_caught_up_over_several_steps() -> None:
    proposer, _ = make_draft(toy_program(LAYERS), max_num_batched_tokens=8)
    long, short = make_sequence([1] * 20), make_sequence([2, 3])
    num_drafts = []
    for token in range(4):
        drafts = proposer.propose({long: 3, short: 3})
        num_drafts.append((len(drafts.get(long, [])), len(drafts.get(short, []))))
        short.token_ids.append(token)
    assert num_drafts == [(0, 0), (0, 0), (3, 3), (0, 3)], "the short one waits its turn; the long one has not grown"
    long.token_ids.append(5)
    assert proposer.propose({long: 3})[long] == reference_tokens(LAYERS, long.token_ids, 3)


def test_what_is_too_long_or_finds_no_room_is_not_drafted_for() -> None:
    proposer, _ = make_draft(toy_program(LAYERS, max_model_len=12))
    sequence = make_sequence([1] * 10)
    assert len(proposer.propose({sequence: 4})[sequence]) == 2
    sequence.token_ids += [2, 3]
    assert proposer.propose({sequence: 4}) == {}
    crowd = [make_sequence([1, 2, at]) for at in range(5)]
    proposer, _ = make_draft(toy_program(LAYERS))  # three slots
    assert len(proposer.propose(dict.fromkeys(crowd, 2))) == 3
    proposer.release(crowd[0])
    assert crowd[3] in proposer.propose(dict.fromkeys(crowd[1:], 2))


def test_memory_is_shared_by_what_a_sequence_takes() -> None:
    options = {"kv_cache_memory_bytes": 1_000_000}
    _, rest = make_draft(toy_program(LAYERS), **options)
    assert rest.kv_cache_memory_bytes == 500_000
    _, rest = make_draft(toy_program(("full",)), **options)
    assert rest.kv_cache_memory_bytes is not None and 500_000 < rest.kv_cache_memory_bytes < 700_000


def test_another_vocabulary_or_no_draft_model_is_refused() -> None:
    program = toy_program(("full",))
    smaller = Program(**{**vars(program), "vocab_size": 5})
    with pytest.raises(ConfigError, match="vocabulary of 5 tokens, the model one of 23"):
        make_draft(smaller)
    with pytest.raises(ConfigError, match="given none"):
        Engine(program, EngineOptions(speculative_config=CONFIG), 64)
