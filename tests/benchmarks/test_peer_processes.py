"""A peer's process: its answers are told from what it prints, it stands still between turns, and it fails in words."""

import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.benchmarks.conftest import BENCHMARKS

Script = Callable[[str], Any]

ADAPTER = """
import os, sys
from worker import serve

class Fake:
    def __init__(self, job):
        print("loading", job["model"])
        os.system("echo a child speaks")
    def generate(self, prompts, lengths, emit):
        print("not an answer")
        if prompts[0] == [13]:
            raise ValueError("unlucky")
        if prompts[0] == [14]:
            sys.stderr.write("leaving")
            os._exit(3)
        for step in range(max(lengths)):
            for index, length in enumerate(lengths):
                if step < length - (prompts[0] == [15]):
                    emit(index, [len(prompts[index]) + step])
    def facts(self):
        return {"pid": os.getpid()}

serve(Fake)
"""


@pytest.fixture
def peer(script: Script, tmp_path: Path) -> Iterator[Any]:
    process = script("peers.process")
    adapter = tmp_path / "adapter.py"
    adapter.write_text(ADAPTER)
    variables = {"PYTHONPATH": str(BENCHMARKS / "peers")}
    with process.Peer([sys.executable, str(adapter)], {"model": "m"}, variables, tmp_path / "log") as running:
        yield running


def test_answers_are_what_was_emitted(peer: Any) -> None:
    answer = peer.ask("generate", prompts=[[1, 2], [3]], lengths=[3, 1])
    assert answer["tokens"] == [[2, 3, 4], [1]]
    assert answer["num_first"] == 1
    assert 0 < answer["first_seconds"] <= answer["last_seconds"] < peer.seconds_since_launch
    assert peer.ask("settle") == {"settle": None}
    assert peer.peak_bytes() > 1e6


def test_it_stands_still_between_its_turns(peer: Any) -> None:
    pid = peer.ask("facts")["facts"]["pid"]
    deadline = time.monotonic() + 10
    while psutil.Process(pid).status() != psutil.STATUS_STOPPED:  # a signal arrives when it does
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert peer.ask("facts")["facts"]["pid"] == pid


def test_failures_come_in_words_and_the_peer_goes_on(peer: Any, script: Script) -> None:
    error = script("peers.process").PeerError
    with pytest.raises(error, match="ValueError: unlucky"):
        peer.ask("generate", prompts=[[13]], lengths=[1])
    with pytest.raises(error, match=r"asked for \[2\] tokens, got \[1\]"):
        peer.ask("generate", prompts=[[15]], lengths=[2])
    assert peer.ask("generate", prompts=[[1]], lengths=[1])["tokens"] == [[1]]
    with pytest.raises(error, match="ended with status 3"):
        peer.ask("generate", prompts=[[14]], lengths=[1])
    peer.end()  # and again when the fixture ends


def test_a_model_that_cannot_be_loaded_is_an_answer_too(script: Script, tmp_path: Path) -> None:
    process = script("peers.process")
    adapter = tmp_path / "adapter.py"
    adapter.write_text(ADAPTER)
    variables = {"PYTHONPATH": str(BENCHMARKS / "peers")}
    with (
        process.Peer([sys.executable, str(adapter)], {}, variables, tmp_path / "log") as running,
        pytest.raises(process.PeerError, match="KeyError: 'model'"),
    ):
        running.ask("facts")


def test_a_server_is_waited_for_and_stands_still_when_told(script: Script, tmp_path: Path) -> None:
    process = script("peers.process")
    command = [sys.executable, "-m", "http.server", "{port}", "--bind", "127.0.0.1", "--directory", str(tmp_path)]
    with process.Server(command, {}, tmp_path / "log") as server:
        server.wait_until_ready("/", 20)
        server.hold()
        with pytest.raises(OSError, match="timed out"):
            urllib.request.urlopen(server.url, timeout=0.2)
        server.release()
        assert b"log" in urllib.request.urlopen(server.url, timeout=20).read()
        with pytest.raises(process.PeerError, match="not ready after 0 seconds"):
            server.wait_until_ready("/nowhere", 0.1)
    with (
        process.Server([sys.executable, "-c", "raise SystemExit(3)"], {}, tmp_path / "log") as server,
        pytest.raises(process.PeerError, match="ended with status 3"),
    ):
        server.wait_until_ready("/", 20)


def test_what_two_answers_have_in_common_is_counted_from_the_front(script: Script) -> None:
    agreement = script("peers.summary").agreement
    assert agreement([[1, 2, 3], [4, 5, 6]], [[1, 2, 9], [4, 5, 6]]) == 2.5
    assert agreement([[7, 2, 3]], [[1, 2, 3]]) == 0.0
    assert agreement([[1, 2], [3, 4]], [[1, 2]]) == 2  # the other was too slow to answer twice


def test_a_peer_without_an_environment_says_why(script: Script) -> None:
    environments = script("peers.environments")
    command = [sys.executable, "-c", "import sys; sys.exit('first\\nERROR: no matching distribution\\n')"]
    with pytest.raises(environments.NotAvailable, match="ERROR: no matching distribution"):
        environments._run(command, {})


LOAD = {"decode": (3, 4), "prefill": (5,), "num_requests": 2, "prompts": (1, 2), "outputs": (1, 3)}


def _rounds(script: Script, tmp_path: Path, names: dict[str, str]) -> tuple[Any, Any]:
    """Rounds of fake peers, by name -> source of the adapter, and their subjects."""
    rounds, subjects = script("peers.rounds"), script("peers.subjects")
    made = []
    for name, source in names.items():
        adapter = tmp_path / f"{name}.py"
        adapter.write_text(source)
        made.append(
            subjects.Subject(
                name=name,
                precision="bf16",
                command=[sys.executable, str(adapter)],
                job={"model": "m"},
                variables={"PYTHONPATH": str(BENCHMARKS / "peers")},
                log=tmp_path / "log",
            )
        )
    return rounds.Rounds(rounds.Load(**LOAD), 10), made


def test_a_subject_that_fails_leaves_the_others_alone(script: Script, tmp_path: Path) -> None:
    unlucky = ADAPTER.replace("prompts[0] == [13]", "len(prompts[0]) == 5")
    rounds, subjects = _rounds(script, tmp_path, {"good": ADAPTER, "bad": unlucky, "gone": "raise SystemExit(1)"})
    with ExitStack() as stack:
        rounds.start(subjects, 2, stack)
        for turn in range(2):
            rounds.once(counted=turn > 0)
        facts = rounds.end()
    assert rounds.failed.keys() == {"bad", "gone"}
    assert rounds.failed["bad"] == "prefill_5: ValueError: unlucky"
    assert rounds.failed["gone"].startswith("start: ended with status 1")
    assert facts.keys() == {"good"}
    figures = rounds.samples["good"]
    assert {figure: len(values) for figure, values in figures.items()} == dict.fromkeys(figures, 1)
    assert figures.keys() >= {"first_start_seconds", "start_seconds", "decode", "prefill_5", "requests"}
    assert len(rounds.tokens["good"]) == 2


def test_what_is_slow_is_done_once(script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script("peers.rounds"), "SLOW_SECONDS", 0.0)
    rounds, subjects = _rounds(script, tmp_path, {"slow": ADAPTER})
    with ExitStack() as stack:
        rounds.start(subjects, 4, stack)
        for turn in range(3):
            rounds.once(counted=turn > 0)
            assert len(rounds.tokens["slow"]) == 1
            assert ("requests" in rounds.samples["slow"]) == (turn > 0)  # fewer are sent in the first round
    assert {figure: len(values) for figure, values in rounds.samples["slow"].items()} == dict.fromkeys(
        (
            "first_start_seconds",
            "one_peak_bytes",
            "start_seconds",
            "decode",
            "first_token_seconds",
            "prefill_5",
            "requests",
        ),
        1,
    )
