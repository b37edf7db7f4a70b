"""A draft head reads hidden states from the pages of the model: however they came there, they are the right ones.

The toy's head is never wrong when it reads what it should, so that one rejected draft is one wrong read.
"""

from typing import Any

import pytest

from autodeploy.config import EngineOptions
from autodeploy.errors import ConfigError
from autodeploy.runtime.engine import Engine
from autodeploy.runtime.request import SamplingParams
from tests.engines import generated
from tests.runtime.toy import reference_tokens, toy_program

HEAD = {"method": "eagle", "model": "a head of the program", "num_speculative_tokens": 4}
GREEDY = SamplingParams(temperature=0, max_tokens=20)


def make_engine(layer: str = "full", *, errs_every: int = 0, **options: Any) -> Engine:
    chosen = EngineOptions(**{"page_size": 4, "max_num_seqs": 6, "speculative_config": HEAD, **options})
    return Engine(toy_program((layer,), head_errs_every=errs_every), chosen, 64)


@pytest.mark.parametrize("layer", ["full", "slot"])
@pytest.mark.parametrize(
    "options",
    [{}, {"max_num_batched_tokens": 9}, {"enable_prefix_caching": False}, {"kv_cache_memory_bytes": 2600}],
    ids=["plain", "chunked", "no prefix cache", "preempted"],
)
def test_a_perfect_head_is_never_rejected(layer: str, options: dict[str, Any]) -> None:
    common = list(range(1, 10))
    prompts = [[*common, at] for at in range(4)] + [[at] for at in range(2)] + [[7] * 17]
    engine = make_engine(layer, **options)
    assert generated(engine, prompts, GREEDY) == [reference_tokens((layer,), prompt, 20) for prompt in prompts]
    stats = engine.stats()
    assert stats.accepted_tokens == stats.draft_tokens > 60
    if "kv_cache_memory_bytes" in options:
        assert stats.num_preemptions > 0 or layer == "slot", "memory was meant to be short"


def test_prefixes_that_were_computed_for_others_are_drafted_behind() -> None:
    engine = make_engine()
    prompt = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
    for _ in range(2):
        assert generated(engine, [prompt], GREEDY) == [reference_tokens(("full",), prompt, 20)]
    stats = engine.stats()
    assert stats.prefix_cache_hit_tokens > 0
    assert stats.accepted_tokens == stats.draft_tokens > 0 and stats.acceptance_length > 3


@pytest.mark.parametrize("layer", ["full", "slot"])
def test_wrong_drafts_change_nothing(layer: str) -> None:
    engine = make_engine(layer, errs_every=2)
    prompts = [[1, 2, 3], [4] * 11, [5, 6]]
    params = SamplingParams(temperature=0, max_tokens=30, repetition_penalty=1.2)
    plain = Engine(toy_program((layer,)), EngineOptions(page_size=4), 64)
    assert generated(engine, prompts, params) == generated(plain, prompts, params)
    assert 0 < engine.stats().accepted_tokens < engine.stats().draft_tokens


def test_a_program_without_a_head_is_refused() -> None:
    with pytest.raises(ConfigError, match="built without one"):
        Engine(toy_program(("full",)), EngineOptions(speculative_config=HEAD), 64)
