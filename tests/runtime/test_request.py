"""What is accepted, what is refused with which field named, and when a sequence ends."""

import math
from typing import Any

import pytest

from autodeploy.errors import InvalidRequestError
from autodeploy.runtime.request import Limits, Request, SamplingParams, Sequence, new_sequences

LIMITS = Limits(vocab_size=100, max_model_len=10, eos_token_ids=(2, 3, 100_000))


def make(prompt: list[int], **params: Any) -> list[Sequence]:
    return new_sequences(Request("r", prompt, SamplingParams(**params), arrival=0), LIMITS)


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("temperature", [-0.1, math.nan, math.inf, -math.inf, 1e300, 10**400, "1", None, True]),
        ("top_p", [0, 0.0, -0.5, 1.01, math.nan, None, False]),
        ("top_k", [-2, 1.5, math.nan, True, None, "5"]),
        ("min_p", [-0.1, 1.1, math.nan, None]),
        ("presence_penalty", [-2.1, 2.1, math.nan, "0"]),
        ("frequency_penalty", [-2.1, 2.1, math.inf, None]),
        ("repetition_penalty", [0, 0.0, -1.0, math.nan, math.inf, 1e30]),
        ("seed", [1.0, 2**63, "1", True]),
        ("n", [0, -1, 129, 10**9, 1.0, True, None]),
        ("max_tokens", [0, -1, 1.0, True, "16"]),
        ("min_tokens", [-1, 1.0, 17, None]),
        ("logprobs", [-1, 21, 1.0, True]),
        ("stop", ["", [""], ["a"] * 33, ["x" * 1025], [1], 1, {"a"}, b"a"]),
        ("stop_token_ids", [5, [-1], [1.0], [True], ["1"], "12", list(range(129))]),
        ("ignore_eos", [1, None, "yes"]),
        ("detokenize", [0]),
        ("skip_special_tokens", [0]),
        ("include_stop_str_in_output", ["no"]),
    ],
)
def test_a_bad_parameter_is_refused_by_name(name: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(InvalidRequestError, match=name) as caught:
            SamplingParams(**{name: value})
        assert caught.value.parameter == name, value


def test_values_at_the_edge_are_accepted() -> None:
    SamplingParams(
        temperature=0, top_p=1, top_k=-1, min_p=1, presence_penalty=-2, frequency_penalty=2, n=128, logprobs=20
    )
    SamplingParams(max_tokens=5, min_tokens=5, seed=-1, logprobs=0, stop_token_ids=[], stop=[])
    SamplingParams(max_tokens=None, min_tokens=10**6)


def test_stop_values_are_copied() -> None:
    ids = [1, 2]
    params = SamplingParams(stop="a", stop_token_ids=ids)
    ids.append(-1)
    assert params.stop == ("a",) and params.stop_token_ids == (1, 2)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "empty"),
        ([1, 100], r"\[1\] is 100.*0 to 99"),
        ([-1], r"\[0\] is -1"),
        ([1, True], r"\[1\] is True"),
        ([1, 2.0], r"\[1\] is 2.0"),
        ("abc", "of type str"),
        (b"abc", "of type bytes"),
        (None, "of type NoneType"),
        ([1] * 10, "10 tokens.*at most 9"),
    ],
)
def test_a_bad_prompt_is_refused(prompt: Any, message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message) as caught:
        make(prompt)
    assert caught.value.parameter == "prompt_token_ids"


def test_a_stop_token_outside_the_vocabulary_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match=r"stop_token_ids.*100"):
        make([1], stop_token_ids=[5, 100])


@pytest.mark.parametrize("priority", ["1", 1.0, None, True, 2**31])
def test_a_bad_priority_is_refused(priority: Any) -> None:
    with pytest.raises(InvalidRequestError, match="priority"):
        new_sequences(Request("r", [1], SamplingParams(), 0, priority), LIMITS)


def test_the_model_end_token_is_no_stop_reason_but_a_requested_one_is() -> None:
    (sequence,) = make([1], stop_token_ids=[5])
    sequence.append(4)
    assert sequence.finish_reason is None
    sequence.append(3)
    assert (sequence.finish_reason, sequence.stop_reason, sequence.token_ids) == ("stop", None, [1, 4, 3])
    (sequence,) = make([1], stop_token_ids=[5, 3], ignore_eos=True)
    sequence.append(2)
    assert sequence.finish_reason is None
    sequence.append(3)
    assert (sequence.finish_reason, sequence.stop_reason) == ("stop", 3)


def test_length_is_the_smaller_of_max_tokens_and_context() -> None:
    for max_tokens, expected in ((3, 3), (1000, 8), (None, 8)):
        (sequence,) = make([1, 1], max_tokens=max_tokens)
        while sequence.finish_reason is None:
            sequence.append(9)
        assert sequence.finish_reason == "length" and sequence.num_output_tokens == expected


def test_a_stop_token_at_the_last_position_is_a_stop() -> None:
    (sequence,) = make([1], max_tokens=1)
    sequence.append(2)
    assert sequence.finish_reason == "stop"
