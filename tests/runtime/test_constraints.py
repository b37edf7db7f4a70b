"""Each constraint against logits computed by hand, alone and together, and what is refused."""

from typing import Any

import pytest
import torch

from autodeploy.errors import InvalidRequestError
from autodeploy.runtime.constraints import Constraints
from autodeploy.runtime.request import Limits, Request, SamplingParams, new_sequences
from autodeploy.runtime.sampler import Sampler
from autodeploy.runtime.tokenizer import with_token_ids
from tests.runtime.test_sampler import make_sequence
from tests.runtime.tiny_tokenizers import byte_level

LOGITS = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
NEVER = float("-inf")


def constrained(output: list[int] = [], **params: Any) -> list[float]:  # noqa: B006
    before = LOGITS.clone()
    result = Constraints().apply(LOGITS, [make_sequence([9], output, **params)])
    assert torch.equal(LOGITS, before), "the argument is left as it is"
    return list(result[0].tolist())


def test_logit_bias_is_added() -> None:
    assert constrained(logit_bias={0: 5, 3: -100.0}) == [5.0, 1.0, 2.0, -97.0]


def test_only_allowed_tokens_are_left() -> None:
    assert constrained(allowed_token_ids=[2, 0, 2]) == [0.0, NEVER, 2.0, NEVER]
    assert constrained(allowed_token_ids=[0, 3], logit_bias={0: 4.0, 1: 9.0}) == [4.0, NEVER, NEVER, 3.0]


@pytest.mark.parametrize(
    ("output", "forbidden"),
    [([], {3}), ([1], {3}), ([1, 2], {0, 3}), ([2, 1, 2], {0, 3}), ([1, 2, 1], {3}), ([2], {3})],
)
def test_the_last_token_of_a_bad_sequence_is_ruled_out(output: list[int], forbidden: set[int]) -> None:
    found = constrained(output, bad_token_sequences=[[1, 2, 0], [3]])
    assert {token for token, logit in enumerate(found) if logit == NEVER} == forbidden


def test_a_bad_sequence_does_not_begin_in_the_prompt() -> None:
    sequence = make_sequence([1, 2], [], bad_token_sequences=[[1, 2, 0]])
    assert torch.equal(Constraints().apply(LOGITS, [sequence]), LOGITS)


def test_rows_without_constraints_stay_as_they_are() -> None:
    logits = LOGITS.repeat(3, 1)
    free, bound = make_sequence(), make_sequence(allowed_token_ids=[1])
    result = Constraints().apply(logits, [free, bound, free])
    assert torch.equal(result[::2], logits[::2]) and result[1].tolist() == [NEVER, 1.0, NEVER, NEVER]
    assert Constraints().apply(logits, [free] * 3) is logits


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_sampling_follows_the_constraints_and_logprobs_do_not(temperature: float) -> None:
    sequence = make_sequence(allowed_token_ids=[1], temperature=temperature, logprobs=1)
    samples = Sampler(seed=0).sample(LOGITS, [sequence])
    assert samples.token_ids == [1] and samples.logprobs[0] is not None
    assert samples.logprobs[0][1].logprob == pytest.approx(torch.log_softmax(LOGITS, -1)[0, 1].item())
    assert samples.logprobs[0][1].rank == 3 and samples.logprobs[0][3].rank == 1
    nothing_left = make_sequence(allowed_token_ids=[1], bad_token_sequences=[[1]], temperature=temperature)
    assert Sampler(seed=0).sample(LOGITS, [nothing_left]).token_ids == [None]


def test_bad_words_are_ruled_out_at_the_start_and_after_a_space() -> None:
    tokenizer = byte_level()
    params = with_token_ids(SamplingParams(bad_words=["hello"]), tokenizer)
    written = {tokenizer.decode(token_ids) for token_ids in params.bad_token_sequences or ()}
    assert not params.bad_words and written == {"hello", " hello"}
    untouched = SamplingParams(bad_words=["hello"])
    assert with_token_ids(untouched, None) is untouched
    with pytest.raises(InvalidRequestError, match="need a tokenizer"):
        new_sequences(Request("r", [1], untouched, 0), Limits(10, 100))


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"logit_bias": {1: 101}}, "from -100 to 100"),
        ({"logit_bias": {1: float("nan")}}, "from -100 to 100"),
        ({"logit_bias": {-1: 1.0}}, "at least 0"),
        ({"logit_bias": {"1": 1.0}}, "whole number"),
        ({"logit_bias": [1]}, "must map"),
        ({"logit_bias": {token: 0 for token in range(2000)}}, "at most 1024"),
        ({"allowed_token_ids": []}, "is empty"),
        ({"allowed_token_ids": "12"}, "list of token ids"),
        ({"bad_words": [""]}, "1 to 1024"),
        ({"bad_words": ["x"] * 1000}, "at most 256"),
        ({"bad_token_sequences": [[]]}, "empty sequence"),
        ({"bad_token_sequences": [1]}, "list of token ids"),
        ({"prompt_logprobs": 21}, "at most 20"),
    ],
)
def test_bad_constraints_are_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        SamplingParams(**params)
    assert caught.value.parameter == next(iter(params))


@pytest.mark.parametrize(
    "params", [{"logit_bias": {23: 1.0}}, {"allowed_token_ids": [1, 23]}, {"bad_token_sequences": [[1], [2, 23]]}]
)
def test_tokens_outside_the_vocabulary_are_refused_before_they_reach_the_device(params: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequestError, match="23, which is not a token") as caught:
        new_sequences(Request("r", [1], SamplingParams(**params), 0), Limits(23, 100))
    assert caught.value.parameter == next(iter(params))
