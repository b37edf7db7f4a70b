"""LLM against a scripted engine: prompts in every form, stop strings, errors before anything starts, streaming."""

import asyncio
import itertools
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from autodeploy.compile.program import Program
from autodeploy.config import Options
from autodeploy.errors import CheckpointError, ConfigError, EngineDeadError, InvalidRequestError
from autodeploy.llm import LLM
from autodeploy.models.locate import LocatedModel
from autodeploy.runtime.request import SamplingParams
from tests.runtime.fake_engine import FakeEngine
from tests.runtime.tiny_tokenizers import byte_level

TOKENIZER = byte_level()
ANSWER = "hello wörld 😀 the end"
ANSWER_IDS = TOKENIZER.encode(ANSWER)
EOS = TOKENIZER.hf.eos_token_id
LONG = SamplingParams(max_tokens=100)

Make = Callable[..., LLM]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Make]:
    """Makes an LLM whose build gives an empty program and whose engine is `fake`."""
    folder = tmp_path / "checkpoint"
    TOKENIZER.hf.save_pretrained(str(folder))
    made: list[LLM] = []

    def make_llm(
        fake: FakeEngine | None = None, model: Any = "checkpoint", defaults: Mapping[str, Any] = {}, **options: Any
    ) -> LLM:
        engine = fake or FakeEngine(ANSWER_IDS, eos_id=EOS)
        located = LocatedModel(name="checkpoint", folder=folder, weight_files=(), config={}, generation=dict(defaults))

        def build(model: Any, options: Options, *, progress: Any = None) -> Program:
            return Program(
                graphs={}, states=(), vocab_size=1000, max_model_len=64, dtype=torch.float32, device=torch.device("cpu")
            )

        def make_engine(
            program: Program, options: Any, max_model_len: int | None, *others: object, **named: object
        ) -> FakeEngine:
            engine.program, engine.max_model_len = program, max_model_len or 64
            return engine

        monkeypatch.setattr("autodeploy.instant_on.build", build)
        monkeypatch.setattr("autodeploy.llm.locate_model", lambda model, options: located)
        monkeypatch.setattr("autodeploy.llm.Engine", make_engine)
        made.append(LLM(model, **options))
        return made[-1]

    yield make_llm
    for llm in made:
        llm.shutdown()


def test_every_form_of_prompt(make: Make) -> None:
    llm = make()
    ids = TOKENIZER.encode("hello")
    forms: list[Any] = ["hello", ids, {"prompt": "hello"}, {"prompt_token_ids": ids}]
    for form in forms:
        (output,) = llm.generate(form, LONG, use_tqdm=False)
        assert output.prompt_token_ids == ids
        assert output.outputs[0].text == ANSWER
        assert output.finished and output.outputs[0].finish_reason == "stop"
    outputs = llm.generate(forms, LONG, use_tqdm=False)
    assert [output.prompt for output in outputs] == ["hello", None, "hello", None]
    assert llm.generate([], LONG, use_tqdm=False) == []
    assert llm.generate([ids, ids], LONG, use_tqdm=False)[1].prompt_token_ids == ids


def test_priority_and_salt_reach_the_engine_and_cached_tokens_come_back(make: Make) -> None:
    fake = FakeEngine(ANSWER_IDS, eos_id=EOS, num_cached_tokens=2)
    llm = make(fake)
    prompts = [{"prompt": "one", "cache_salt": "a"}, {"prompt_token_ids": [1, 2, 3], "cache_salt": "b"}, "two"]
    outputs = llm.generate(prompts, LONG, use_tqdm=False, priority=3)
    assert [options.get("cache_salt") for options in fake.options.values()] == ["a", "b", None]
    assert all(options.get("priority") == 3 for options in fake.options.values())
    assert [output.num_cached_tokens for output in outputs] == [2, 2, 2]
    with pytest.raises(InvalidRequestError, match="cache_salt"):
        llm.generate({"prompt": "one", "cache_salt": ""}, use_tqdm=False)


def test_outputs_are_in_the_order_of_the_prompts(make: Make) -> None:
    llm = make(FakeEngine())  # repeats the prompt's tokens
    params = [SamplingParams(max_tokens=limit) for limit in (9, 1, 5)]
    outputs = llm.generate([[5], [6], [7]], params, use_tqdm=False)
    assert [output.outputs[0].token_ids for output in outputs] == [[5] * 9, [6], [7] * 5]


def test_one_sampling_params_per_prompt_or_an_error(make: Make) -> None:
    llm = make()
    with pytest.raises(InvalidRequestError, match="2 sampling params for 1 prompts"):
        llm.generate(["hello"], [LONG, LONG])
    with pytest.raises(InvalidRequestError, match="must be SamplingParams"):
        llm.generate(["hello"], [{"temperature": 1}])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("", "prompt is empty"),
        ([], "prompt is empty"),
        ({"prompt": ""}, "prompt is empty"),
        ({}, "needs 'prompt'"),
        ({"prompt": "x", "image": 1}, "unknown prompt keys: 'image'"),
        (3.5, "got float"),
        ([1, "x"], "must be an int"),
        ([1, 1000], "not a token of this model"),
        ([-1], "not a token of this model"),
        ([1] * 64, "64 tokens"),
        ("a\ud800", "lone surrogate"),
    ],
)
def test_a_bad_prompt_stops_all_before_anything_starts(make: Make, prompt: Any, message: str) -> None:
    fake = FakeEngine(ANSWER_IDS)
    llm = make(fake)
    with pytest.raises(InvalidRequestError, match=message):
        llm.generate(["hello", prompt], LONG)
    assert fake.added == []


def test_nothing_more_than_the_queue_holds_is_submitted(make: Make) -> None:
    fake = FakeEngine(max_queued=4)
    llm = make(fake, max_queued_requests=4)
    outputs = llm.generate([[i + 1] for i in range(30)], SamplingParams(max_tokens=3), use_tqdm=False)
    assert [output.outputs[0].token_ids for output in outputs] == [[i + 1] * 3 for i in range(30)]
    assert fake.most_at_once <= 4


def test_a_stop_string_across_tokens_ends_the_text_and_the_work(make: Make) -> None:
    fake = FakeEngine(ANSWER_IDS, eos_id=EOS, step_seconds=0.005)
    llm = make(fake)
    stop = "ld 😀"
    (output,) = llm.generate("hello", SamplingParams(max_tokens=100, stop=["zzz", stop]), use_tqdm=False)
    assert output.outputs[0].text == "hello wör"
    assert (output.outputs[0].finish_reason, output.outputs[0].stop_reason) == ("stop", stop)
    deadline = time.monotonic() + 5
    while not fake.aborted and time.monotonic() < deadline:
        time.sleep(0.005)
    assert fake.aborted and fake.aborted[0][1] == 0
    params = SamplingParams(max_tokens=100, stop=stop, include_stop_str_in_output=True)
    assert llm.generate("hello", params, use_tqdm=False)[0].outputs[0].text == "hello wörld 😀"


def test_a_stop_string_within_min_tokens_does_not_count(make: Make) -> None:
    llm = make()
    params = SamplingParams(max_tokens=100, stop="h", min_tokens=len(TOKENIZER.encode("hello")))
    (output,) = llm.generate("hello", params, use_tqdm=False)
    assert output.outputs[0].text == "hello wörld 😀 t"


def test_the_token_that_ends_is_no_text(make: Make) -> None:
    visible = TOKENIZER.encode("a")[0]
    llm = make(FakeEngine(ANSWER_IDS, eos_id=visible))
    assert llm.generate("x", LONG, use_tqdm=False)[0].outputs[0].text == ANSWER
    shown = SamplingParams(max_tokens=100, include_stop_str_in_output=True)
    assert llm.generate("x", shown, use_tqdm=False)[0].outputs[0].text == ANSWER + "a"
    assert llm.generate("x", LONG, use_tqdm=False)[0].outputs[0].token_ids == [*ANSWER_IDS, visible]


def test_n_sequences_and_logprobs(make: Make) -> None:
    (output,) = make().generate("x", SamplingParams(n=2, max_tokens=3, logprobs=1), use_tqdm=False)
    assert [completion.index for completion in output.outputs] == [0, 1]
    first = output.outputs[0]
    assert first.logprobs is not None and [len(entry) for entry in first.logprobs] == [2, 2, 2]
    assert first.cumulative_logprob == pytest.approx(3 * -0.6931, abs=1e-3)
    assert make().generate("x", SamplingParams(max_tokens=3), use_tqdm=False)[0].outputs[0].cumulative_logprob is None


def test_token_ids_only(make: Make) -> None:
    llm = make(skip_tokenizer_init=True)
    (output,) = llm.generate([5, 6], LONG, use_tqdm=False)
    assert output.outputs[0].text == "" and output.outputs[0].token_ids == [*ANSWER_IDS, EOS]
    with pytest.raises(InvalidRequestError, match=r"skip_tokenizer_init=True.*pass token ids"):
        llm.generate("text", LONG)
    with pytest.raises(InvalidRequestError, match="stop strings need text"):
        llm.generate([5], SamplingParams(stop="x"))
    with pytest.raises(InvalidRequestError, match="skip_tokenizer_init"):
        llm.chat([{"role": "user", "content": "x"}])
    with pytest.raises(InvalidRequestError, match="skip_tokenizer_init"):
        llm.get_tokenizer()


def test_a_module_has_no_tokenizer_unless_given(make: Make, tmp_path: Path) -> None:
    llm = make(model=nn.Linear(1, 1))
    assert llm.name == "Linear"
    with pytest.raises(InvalidRequestError, match="tokenizer= was not given"):
        llm.generate("text")
    with_tokenizer = make(model=nn.Linear(1, 1), tokenizer=str(tmp_path / "checkpoint"))
    assert with_tokenizer.generate("text", LONG, use_tqdm=False)[0].outputs[0].text == ANSWER


def test_detokenize_false_leaves_the_text_empty(make: Make) -> None:
    assert make().generate("x", SamplingParams(detokenize=False), use_tqdm=False)[0].outputs[0].text == ""


def test_chat_one_conversation_or_many(make: Make) -> None:
    llm = make()
    conversation = [{"role": "user", "content": "hello"}]
    (output,) = llm.chat(conversation, LONG, use_tqdm=False)
    assert output.prompt_token_ids == TOKENIZER.apply_chat_template(conversation)
    assert output.outputs[0].text == ANSWER
    assert len(llm.chat([conversation, conversation], LONG, use_tqdm=False)) == 2
    bare = llm.chat(conversation, LONG, use_tqdm=False, add_generation_prompt=False)[0]
    assert len(bare.prompt_token_ids) < len(output.prompt_token_ids)
    own = llm.chat(conversation, LONG, use_tqdm=False, chat_template="{{ messages[0].content }}")[0]
    assert own.prompt_token_ids == TOKENIZER.encode("hello")


@pytest.mark.parametrize("messages", [[], "hello", [{"content": "x"}], [[]]])
def test_bad_messages(make: Make, messages: Any) -> None:
    with pytest.raises(InvalidRequestError, match="list of dicts with 'role'"):
        make().chat(messages, LONG)


def test_the_default_length_is_warned_of_once(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    llm = make(FakeEngine())
    with caplog.at_level(logging.WARNING, "autodeploy.llm"):
        llm.generate([1], SamplingParams(max_tokens=15), use_tqdm=False)
        assert not caplog.records
        llm.generate([1], SamplingParams(), use_tqdm=False)
        llm.generate([1], SamplingParams(), use_tqdm=False)
    assert [record.message for record in caplog.records if "max_tokens=16" in record.message] == [
        caplog.records[0].message
    ]


def test_default_sampling_params_are_the_models_own(make: Make) -> None:
    llm = make(defaults={"temperature": 0.25, "top_k": 7})
    params = llm.get_default_sampling_params()
    assert (params.temperature, params.top_k, params.max_tokens) == (0.25, 7, 16)


def test_streaming_grows_and_equals_the_whole(make: Make) -> None:
    llm = make()

    async def stream() -> list[str]:
        return [output.outputs[0].text async for output in llm.generate_async("hello", LONG, streaming=True)]

    async def whole() -> tuple[str, int]:
        pending = llm.generate_async("hello", LONG)
        count = len([output async for output in llm.generate_async("hello", LONG)])
        return (await pending).outputs[0].text, count

    texts = asyncio.run(stream())
    assert texts[-1] == ANSWER and len(texts) > 3
    assert all(after.startswith(before) for before, after in itertools.pairwise(texts))
    assert asyncio.run(whole()) == (ANSWER, 1)


def test_async_stop_string(make: Make) -> None:
    llm = make()
    params = SamplingParams(max_tokens=100, stop=" wö")
    assert asyncio.run(_await(llm, params)) == "hello"
    with pytest.raises(InvalidRequestError, match="prompt is empty"):
        llm.generate_async("")


async def _await(llm: LLM, params: SamplingParams) -> str:
    return (await llm.generate_async("x", params)).outputs[0].text


def test_a_crash_and_a_shutdown_are_engine_dead_errors(make: Make) -> None:
    crashing = make(FakeEngine(crash_at_step=2))
    with pytest.raises(EngineDeadError, match="the cable was pulled"):
        crashing.generate([1], LONG, use_tqdm=False)
    with make() as closed:
        pass
    with pytest.raises(EngineDeadError, match="shut down"):
        closed.generate([1], LONG, use_tqdm=False)


def test_an_interrupted_generate_aborts_its_requests(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeEngine(step_seconds=0.002)
    llm = make(fake)

    def interrupted(*_: Any) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(LLM, "_collect_until_one_is_finished", staticmethod(interrupted))
    with pytest.raises(KeyboardInterrupt):
        llm.generate([[1], [2]], SamplingParams(max_tokens=None), use_tqdm=False)
    deadline = time.monotonic() + 5
    while len(fake.aborted) < 2 and time.monotonic() < deadline:
        time.sleep(0.005)
    assert len(fake.aborted) == 2 and not fake.has_unfinished_requests()


def test_dropping_the_last_reference_ends_the_thread(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    def threads() -> int:
        return sum(thread.name == "autodeploy-engine" for thread in threading.enumerate())

    make()  # patches what LLM needs
    before = threads()
    llm = LLM("checkpoint")
    # the patched engine is shared; only the thread counts here
    assert threads() == before + 1
    del llm
    assert threads() == before


def test_unknown_options_and_missing_tokenizer(make: Make, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'max_num_seqs'"):
        make(max_num_seq=3)
    (tmp_path / "nothing").mkdir()
    with pytest.raises(CheckpointError, match="no usable tokenizer"):
        make(tokenizer=str(tmp_path / "nothing"))
