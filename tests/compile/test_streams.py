"""Branches on a second stream: the same tokens, waits where a device needs them, and used only where faster."""

from typing import Any

import pytest
import torch

from autodeploy.compile import backends
from autodeploy.compile.capture import Work
from autodeploy.compile.program import Program
from autodeploy.compile.streams import Branches
from autodeploy.config import EngineOptions
from autodeploy.debug.capture_checker import CaptureChecker
from autodeploy.debug.stream_checker import StreamChecker
from autodeploy.runtime.engine import Engine
from autodeploy.runtime.request import SamplingParams
from autodeploy.runtime.states import batch_limits
from tests import tiny
from tests.captured import facts, program
from tests.engines import generated

MARK = {"assign_streams": {"enabled": True, "least_bytes": 1000, "device": torch.device("cuda")}}
OPTIONS = EngineOptions(max_num_seqs=3, max_num_batched_tokens=32, page_size=4)
PROMPTS = tiny.prompts(4, longest=12)


class Timed(CaptureChecker):
    """Each work that is timed takes so much of the time of the one before."""

    ratio = 0.5

    def __init__(self) -> None:
        self.last = 1.0

    def seconds(self, repeat: Work) -> float:
        repeat()
        self.last *= self.ratio
        return self.last


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> StreamChecker:
    checker = StreamChecker()
    monkeypatch.setattr(backends, "graph_capture", lambda device: Timed)
    monkeypatch.setattr(backends, "second_stream", lambda device: checker)
    return checker


def served(built: Program, checker: StreamChecker) -> list[list[int]]:
    params = SamplingParams(temperature=0.0, max_tokens=5, ignore_eos=True)
    with checker:
        return generated(Engine(built, OPTIONS, max_model_len=32), PROMPTS, params)


@pytest.mark.parametrize(("name", "least"), [("qwen2_moe", 3), ("deepseek_v3", 5)])
def test_generation_gives_the_same_tokens(name: str, least: int, streams: StreamChecker) -> None:
    """Shared experts beside routed ones; queries beside latents."""
    model = getattr(tiny, name)()
    built = program(model, transforms=MARK, cudagraph_capture_sizes=[1, 3])
    (report,) = (report for report in built.report.transforms if report.name == "assign_streams")
    assert report.rewritten >= least
    assert served(built, streams) == served(program(model, "torch-simple"), streams)
    found = facts(built)
    assert found["not_captured"] == {} and found["steps"]["whole"] > 2
    assert {size: entry["used"] for size, entry in found["streams"].items()} == {1: True, 3: True}
    assert streams.num_branches > found["steps"]["whole"] * report.rewritten


def test_they_are_used_only_where_that_is_faster(streams: StreamChecker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Timed, "ratio", 1.0)
    built = program(tiny.qwen2_moe(), transforms=MARK, cudagraph_capture_sizes=[1])
    Engine(built, OPTIONS, max_model_len=32)
    tried = streams.num_branches
    assert tried > 0 and facts(built)["streams"] == {1: {"used": False, "seconds": 1.0, "seconds_on_two": 1.0}}
    served(built, streams)
    assert streams.num_branches == 2 * tried  # another capture, and no step


def test_a_capture_that_fails_on_two_streams_is_done_on_one(
    streams: StreamChecker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: StreamChecker) -> Any:
        raise RuntimeError("no second stream")

    monkeypatch.setattr(StreamChecker, "beside", refuse)
    built = program(tiny.qwen2_moe(), transforms=MARK, cudagraph_capture_sizes=[1])
    assert len(served(built, streams)) == len(PROMPTS)
    found = facts(built)
    assert found["streams"] == {1: {"used": False, "why_not": "no second stream"}} and found["steps"]["whole"] > 2


@pytest.mark.parametrize("missing", ["the wait", "what is held"])
def test_the_checker_notices_what_is_missing(
    missing: str, streams: StreamChecker, monkeypatch: pytest.MonkeyPatch
) -> None:
    if missing == "the wait":
        monkeypatch.setattr(Branches, "join", lambda self, *held: None)
    else:
        make = Branches._put_aside

        def put_aside(self: Branches, graph: Any, nodes: Any) -> None:
            make(self, graph, nodes)
            for node in graph.graph.nodes:
                if node.target == self.join:
                    node.args = ()

        monkeypatch.setattr(Branches, "_put_aside", put_aside)
    built = program(tiny.deepseek_v3(), transforms=MARK, cudagraph_capture_sizes=[1])
    served(built, streams)
    message = "which stream 0 has not waited for" if missing == "the wait" else "may be given the memory of what"
    assert message in facts(built)["streams"][1]["why_not"]


def test_the_second_capture_of_each_size_is_foreseen(monkeypatch: pytest.MonkeyPatch, streams: StreamChecker) -> None:
    """Each capture takes 10 bytes, also one that is thrown away as it was no faster."""
    used = {"bytes": 0}

    class Measured(Timed):
        def record(self, work: Work) -> Work:
            used["bytes"] += 10
            return super().record(work)

        def used_bytes(self) -> int:
            return used["bytes"]

    monkeypatch.setattr(backends, "graph_capture", lambda device: Measured)
    built = program(tiny.qwen2_moe(), transforms=MARK, cudagraph_capture_sizes=[1, 2, 3])
    reserved = built.reserved_bytes(batch_limits(OPTIONS, 3, 32))
    Engine(built, OPTIONS, max_model_len=32)
    found, num_regions = facts(built), 4  # of three layers: before, between and behind attention
    assert found["bytes"] == reserved == 3 * 10 * (2 + num_regions) and found["streams"].keys() == {1, 2, 3}


def test_nothing_is_put_aside_without_marks(streams: StreamChecker) -> None:
    built = program(tiny.qwen2_moe(), cudagraph_capture_sizes=[1])
    served(built, streams)
    assert streams.num_branches == 0 and facts(built)["streams"] == {}
