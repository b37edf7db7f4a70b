"""Log-probabilities of a prompt against those of a plain Python loop: in chunks, after a preemption, for n > 1."""

import pytest
import torch

from autodeploy.config import EngineOptions
from autodeploy.errors import InvalidRequestError
from autodeploy.runtime.demo import DemoEngine
from autodeploy.runtime.request import Logprob, SamplingParams
from tests.runtime.test_engine import make_engine, short_memory
from tests.runtime.toy import reference_logits, reference_tokens, toy_program

LAYERS = ("slot", "full", "window")
PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9]

Entries = list[dict[int, Logprob] | None]


def expected(prompt: list[int], count: int) -> list[dict[int, float]]:
    rows = torch.tensor([reference_logits(LAYERS, prompt[:end]) for end in range(1, len(prompt))]).log_softmax(-1)
    return [
        {token: row[token].item() for token in (own, *row.topk(count).indices.tolist())}
        for own, row in zip(prompt[1:], rows, strict=True)
    ]


def check(entries: Entries | None, prompt: list[int], count: int) -> None:
    assert entries is not None and entries[0] is None and len(entries) == len(prompt)
    for own, entry, wanted in zip(prompt[1:], entries[1:], expected(prompt, count), strict=True):
        assert entry is not None and next(iter(entry)) == own
        assert {token: item.logprob for token, item in entry.items()} == pytest.approx(wanted)


@pytest.mark.parametrize("budget", [64, 4])
@pytest.mark.parametrize("count", [0, 3])
def test_whole_and_in_chunks_beside_others(budget: int, count: int) -> None:
    engine = make_engine(LAYERS, max_num_batched_tokens=budget)
    params = SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=count)
    engine.add_request("other", [7, 7, 7], SamplingParams(temperature=0, max_tokens=4))
    engine.add_request("asks", PROMPT, params)
    engine.add_request("one", [2], params)
    found: dict[str, list[Entries]] = {"other": [], "asks": [], "one": []}
    tokens: list[int] = []
    while engine.has_unfinished_requests():
        for output in engine.step():
            tokens += output.token_ids if output.request_id == "asks" else []
            if output.prompt_logprobs is not None:
                found[output.request_id].append(output.prompt_logprobs)
    assert tokens == reference_tokens(LAYERS, PROMPT, 4)
    assert found["other"] == [] and found["one"] == [[None]]
    (entries,) = found["asks"]
    check(entries, PROMPT, count)


def test_after_a_preemption_and_for_every_sequence() -> None:
    prompt = (PROMPT * 2)[:28]
    memory = short_memory(LAYERS, 48)
    engine = make_engine(LAYERS, max_model_len=40, max_num_batched_tokens=4, kv_cache_memory_bytes=memory)
    engine.add_request("first", [1, 2, 3, 4, 5, 6], SamplingParams(temperature=0, max_tokens=30))
    engine.add_request("asks", prompt, SamplingParams(temperature=0, max_tokens=2, prompt_logprobs=1, n=2))
    found = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.prompt_logprobs is not None:
                assert output.index not in found
                found[output.index] = output.prompt_logprobs
    assert engine.stats().num_preemptions, "the memory was meant to be short"
    for index in range(2):
        check(found[index], prompt, 1)


def test_the_naive_engine_refuses_them() -> None:
    engine = DemoEngine(toy_program(LAYERS), EngineOptions(page_size=4), 64)
    with pytest.raises(InvalidRequestError, match="runtime=engine"):
        engine.add_request("r", PROMPT, SamplingParams(prompt_logprobs=1))
