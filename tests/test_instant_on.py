"""Instant-on: the first answers come before the graph is built, with the same tokens, and every later start has it."""

import logging
import os
import subprocess
import sys
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

from autodeploy import instant_on
from autodeploy.build import build
from autodeploy.checkpoint import files
from autodeploy.compile.program import Program
from autodeploy.config import EngineOptions, Options, parse_options
from autodeploy.errors import UnsupportedModelError
from autodeploy.instant_on import deploy, live_program
from autodeploy.llm import LLM
from autodeploy.models.locate import LocatedModel, locate_model
from autodeploy.runtime.engine import Engine
from autodeploy.runtime.request import SamplingParams
from tests import tiny

GREEDY = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
CROWDED = EngineOptions(max_num_batched_tokens=16, page_size=4, max_num_seqs=3)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AUTODEPLOY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("AUTODEPLOY_NATIVE", "0")  # this cache directory has no compiled kernels
    monkeypatch.setattr(instant_on, "LEAST_BYTES", 0)
    return tiny.save("llama", tmp_path / "model")


def _located(folder: Path) -> LocatedModel:
    return locate_model(str(folder), Options().model)


def _tokens(engine: Engine, successor: Future[Program] | None = None, ready: Any = None) -> list[list[int]]:
    """Greedy tokens of six prompts; `ready` is given to the future after five steps."""
    prompts = tiny.prompts(6, seed=3)
    for index, prompt in enumerate(prompts):
        engine.add_request(str(index), prompt, GREEDY)
    tokens: list[list[int]] = [[] for _ in prompts]
    steps = 0
    while engine.has_unfinished_requests():
        if successor is not None and steps == 5:
            successor.set_exception(ready) if isinstance(ready, Exception) else successor.set_result(ready)
        for output in engine.step():
            tokens[int(output.request_id)].extend(output.token_ids)
        steps += 1
    return tokens


def test_the_graph_takes_over_between_two_steps_with_the_same_tokens(folder: Path) -> None:
    live, built = live_program(_located(folder), Options(), print), build(str(folder))
    expected = _tokens(Engine(built, CROWDED))
    successor: Future[Program] = Future()
    engine = Engine(live, CROWDED, successor=successor)
    limit = engine.max_model_len
    assert _tokens(engine, successor, built) == expected
    assert engine.program is built and engine.max_model_len == limit
    assert engine.stats().state_usage_fraction == 0.0, "nothing is left behind"


def test_a_graph_that_cannot_be_built_is_reported_and_serving_goes_on(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    live = live_program(_located(folder), Options(), print)
    expected = _tokens(Engine(build(str(folder)), CROWDED))
    successor: Future[Program] = Future()
    engine = Engine(live, CROWDED, successor=successor)
    with caplog.at_level(logging.ERROR):
        assert _tokens(engine, successor, UnsupportedModelError("no graph")) == expected
    assert engine.program is live and caplog.text.count("no graph; serving goes on") == 1
    assert live.report.facts["successor"] == "no graph"


@pytest.fixture
def headers_read(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The weight files whose headers this process has read, once for each time."""
    read: list[Path] = []
    honest = files.SafetensorsFile.__init__

    def counting(self: files.SafetensorsFile, path: Path) -> None:
        read.append(path)
        honest(self, path)

    monkeypatch.setattr(files.SafetensorsFile, "__init__", counting)
    return read


def test_a_first_start_answers_at_once_and_the_next_one_has_the_graph(folder: Path, headers_read: list[Path]) -> None:
    prompts, params = tiny.prompts(2, seed=5), GREEDY
    with LLM(str(folder), skip_tokenizer_init=True) as llm:
        first = llm.generate(prompts, params, use_tqdm=False)
        llm.wait_until_built(timeout=300)
        assert llm.report.facts["graph"] == "restored"
        second = llm.generate(prompts, params, use_tqdm=False)
        assert llm.async_engine.program.report.facts["graph"] == "restored"
    assert [o.outputs[0].token_ids for o in first] == [o.outputs[0].token_ids for o in second]
    assert len(headers_read) == 1
    program, successor = deploy(_located(folder), Options())
    assert successor is None and program.report.facts["graph"] == "restored"
    assert len(headers_read) == 2


def test_a_start_that_ends_after_its_first_answer_leaves_the_graph_behind(folder: Path, tmp_path: Path) -> None:
    code = (
        "from autodeploy import LLM, SamplingParams, instant_on; instant_on.LEAST_BYTES = 0;"
        f"llm = LLM({str(folder)!r}, skip_tokenizer_init=True);"
        "llm.generate([[3, 1, 4]], SamplingParams(max_tokens=1), use_tqdm=False); print(llm.report.facts['graph'])"
    )
    paths = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=paths, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("the model's own code")
    until = time.monotonic() + 300
    while not (kept := list((tmp_path / "cache" / "graphs").glob("[!.]*"))) and time.monotonic() < until:
        time.sleep(0.2)
    assert len(kept) == 1


def test_what_the_other_process_says_reaches_those_who_wait(folder: Path) -> None:
    options = parse_options({"transforms": {"nonsense": {"enabled": False}}})
    successor = instant_on.successor(_located(folder), options)
    with pytest.raises(UnsupportedModelError, match="no transform is called 'nonsense'"):
        successor.result(timeout=300)


@pytest.mark.parametrize(
    "options",
    [
        {"instant_on": False},
        {"strict": True},
        {"graph_cache": False},
        {"runtime": "demollm"},
        {"load_format": "dummy"},
    ],
    ids=str,
)
def test_where_the_graph_is_built_first(folder: Path, options: dict[str, Any]) -> None:
    parsed = parse_options(options)
    program, successor = deploy(locate_model(str(folder), parsed.model), parsed)
    assert successor is None and "match_attention" in program.report.rewrites()


@pytest.mark.parametrize("value", [{"dtype": torch.float32}, {"id2label": {0: "a"}}], ids=str)
def test_an_option_that_cannot_go_to_another_process_as_it_is_builds_the_graph_first(folder: Path, value: Any) -> None:
    options = parse_options({"model_kwargs": value})
    program, successor = deploy(_located(folder), options)
    assert successor is None and "match_attention" in program.report.rewrites()


def test_a_small_model_is_built_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instant_on, "LEAST_BYTES", 10**9)
    assert deploy(_located(folder), Options())[1] is None


def test_a_model_that_cannot_run_by_itself_is_built_first(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Program:
        raise UnsupportedModelError("not over pages")

    monkeypatch.setattr(instant_on, "live_program", refuse)
    assert deploy(_located(folder), Options())[1] is None
