"""What users see when things go wrong: each row of the table in docs/serving.md that no other test shows."""

import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

import autodeploy
from autodeploy.errors import EngineDeadError
from autodeploy.runtime.engine import Engine
from tests import tiny
from tests.runtime.fake_engine import FakeEngine
from tests.server.running import Serve, Start, assert_error, random_engine, wait_until

GREEDY = {"temperature": 0, "ignore_eos": True}


def slowed(engine: Engine, seconds: float) -> Engine:
    """The engine, with steps that take this much longer."""
    step = engine.step

    def slow() -> Any:
        time.sleep(seconds)
        return step()

    engine.step = slow  # type: ignore[method-assign]
    return engine


def open_stream(url: str, body: dict[str, Any], *, receive_buffer: int | None = None) -> socket.socket:
    """A connection that has asked for a stream, and has read nothing."""
    connection = socket.socket()
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.settimeout(60)
    connection.connect(("127.0.0.1", int(url.rpartition(":")[2])))
    content = json.dumps({"stream": True, **body}).encode()
    head = (
        f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    )
    connection.sendall(f"{head}\r\n\r\n".encode() + content)
    return connection


def stream_text(response: Any) -> str:
    """The text of a completion's stream, which must be whole."""
    lines = [line.decode() for line in response.read().splitlines() if line]
    assert lines[-1] == "data: [DONE]"
    return "".join(json.loads(line.removeprefix("data: "))["choices"][0]["text"] for line in lines[:-1])


def test_pages_of_a_client_that_goes_away_are_free_again(start: Start) -> None:
    server = start(slowed(random_engine(), 0.002))
    connection = open_stream(server.url, {"prompt": "x" * 200, "max_tokens": 1800, **GREEDY})
    assert connection.recv(20).startswith(b"HTTP/1.1 200")
    wait_until(lambda: server.engine.stats().state_usage_fraction > 0)
    connection.close()
    wait_until(lambda: server.engine.stats().num_running == 0 and server.engine.stats().state_usage_fraction == 0)
    assert server.engine.stats().generation_tokens < 1800


def test_a_slow_reader_loses_nothing_and_holds_up_nobody(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    """Its answer is longer than what the sockets take, so that the server has to wait with it; the engine does not."""
    url, server, served = serve(random_engine())
    server.servers[0].sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    body = {"prompt": "slow", "max_tokens": 400, "logprobs": 20, **GREEDY}

    def text(body: dict[str, Any]) -> str:
        answer = httpx.post(f"{url}/v1/completions", json=body, timeout=60).json()
        return str(answer["choices"][0]["text"])

    alone = text(body)
    slow = open_stream(url, body, receive_buffer=4096)
    quick = {"prompt": "quick", "max_tokens": 100, **GREEDY}
    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(text, [quick] * 8))) == 1
    wait_until(lambda: served.engine.stats().num_running == 0, seconds=60)
    assert served.engine.stats().state_usage_fraction == 0, "what nobody reads holds no pages"
    assert caplog.text.count("POST /v1/completions 200") == 1 + 8, "of the slow one's answer there is more to send"
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2**20)
    response = http.client.HTTPResponse(slow)
    response.begin()
    assert stream_text(response) == alone
    slow.close()


def test_a_reader_that_takes_nothing_is_disconnected(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autodeploy.server.run.STALLED_READER_SECONDS", 1)
    fake = FakeEngine(step_seconds=0.001)
    url, _, _ = serve(fake)
    body = {"prompt": "x" * 50, "max_tokens": 10**6, "logprobs": 20, **GREEDY}
    connection = open_stream(url, body, receive_buffer=4096)
    wait_until(lambda: bool(fake.aborted) and not fake.has_unfinished_requests(), seconds=60)
    connection.close()
    assert httpx.get(f"{url}/health").status_code == 200


def test_connections_that_send_no_whole_request_are_closed(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one or a later one; an answer may take longer than that, and so may the time between two requests."""
    monkeypatch.setattr("autodeploy.server.run.SLOW_SENDER_SECONDS", 0.3)
    url, _, _ = serve(FakeEngine(step_seconds=0.02))
    body = json.dumps({"prompt": [1], "max_tokens": 50, **GREEDY}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    whole = f"{head}\r\n\r\n".encode() + body
    for sent in (b"", b"GET /hea", whole[:-3], whole + whole[:-3]):
        with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=30) as connection:
            connection.sendall(sent)
            received = connection.makefile("rb").read()
        assert received.count(b"HTTP/1.1 200") == (1 if sent.startswith(whole) else 0)
        assert received == b"" or b'"completion_tokens":50' in received
    patient = http.client.HTTPConnection("127.0.0.1", int(url.rpartition(":")[2]), timeout=30)
    patient.connect()
    patient.auto_open = 0  # not on another connection
    for _ in range(2):
        patient.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        assert b'"completion_tokens":50' in patient.getresponse().read()
        time.sleep(0.6)
    patient.close()


def test_out_of_pages_is_slower_and_otherwise_the_same(start: Start) -> None:
    """Memory for a third of what runs: sequences are put back and computed again; what can never fit is refused."""
    server = start(random_engine(kv_cache_memory_bytes=40 * 128, max_model_len=512))
    bodies = [{"prompt": f"{at} little pigs", "max_tokens": 300, **GREEDY} for at in range(8)]
    alone = [server.post("/v1/completions", body).json()["choices"][0] for body in bodies]
    assert server.engine.stats().num_preemptions == 0
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda body: server.post("/v1/completions", body).json()["choices"][0], bodies))
    assert server.engine.stats().num_preemptions > 0
    assert [choice["text"] for choice in together] == [choice["text"] for choice in alone]
    too_long = {"prompt": [70] * 600, "max_tokens": 1}
    assert_error(server.post("/v1/completions", too_long), 400, "at most 511 tokens", "prompt")


def test_a_kernel_that_raises_ends_everything_and_says_so(start: Start) -> None:
    engine = random_engine()
    run, calls_of_both = engine.program.run, iter(range(10**6))

    def failing(*arguments: Any, **named: Any) -> Any:
        if engine.stats().num_running == 2 and next(calls_of_both) == 20:
            raise RuntimeError("secret: illegal address 0x7f00")
        return run(*arguments, **named)

    object.__setattr__(engine.program, "run", failing)
    server = start(slowed(engine, 0.002))
    body = {"prompt": "x", "max_tokens": 2000, **GREEDY}
    with ThreadPoolExecutor(2) as pool:
        stream = pool.submit(lambda: server.post("/v1/completions", {**body, "stream": True}))
        whole = pool.submit(lambda: server.post("/v1/completions", body))
    assert_error(whole.result(), 503, "the engine has stopped")
    *_, error, last = [line for line in stream.result().text.splitlines() if line]
    assert "the engine has stopped" in error and last == "data: [DONE]"
    assert "secret" not in whole.result().text + stream.result().text
    for path in ("/health", "/ready"):
        assert_error(httpx.get(server.url + path), 503, "stopped")
    assert_error(server.post("/v1/completions", body), 503, "the engine has stopped")
    with pytest.raises(EngineDeadError) as refusal:
        engine.step()
    assert "illegal address" in str(refusal.value.__cause__), "the operator's log has the reason"


def test_a_server_whose_engine_has_failed_tells_everybody_and_ends(serve: Serve) -> None:
    """With an error, by which a supervisor knows to start it anew."""
    fake = FakeEngine(crash_at_step=50, step_seconds=0.01)
    ended: list[BaseException] = []
    url, _, _ = serve(fake, ended=ended)
    body = {"prompt": [1], "max_tokens": 10**6, **GREEDY}
    with ThreadPoolExecutor(2) as pool:
        stream = pool.submit(lambda: httpx.post(f"{url}/v1/completions", json={**body, "stream": True}, timeout=60))
        whole = pool.submit(lambda: httpx.post(f"{url}/v1/completions", json=body, timeout=60))
    assert_error(whole.result(), 503, "the engine has stopped")
    assert [line for line in stream.result().text.splitlines() if line][-1] == "data: [DONE]"
    wait_until(lambda: bool(ended))
    assert isinstance(ended[0], EngineDeadError)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/health")


@pytest.mark.parametrize("jump", [-86_400.0, 86_400.0])
def test_a_clock_that_jumps_changes_no_time_limit(start: Start, monkeypatch: pytest.MonkeyPatch, jump: float) -> None:
    fake = slowed(random_engine(), 0.001)
    server = start(fake, request_timeout_seconds=600, step_timeout_seconds=600)
    wall = time.time
    with ThreadPoolExecutor(1) as pool:
        body = {"prompt": "x", "max_tokens": 200, **GREEDY}
        answer = pool.submit(lambda: server.post("/v1/completions", body).json())
        wait_until(lambda: server.engine.stats().generation_tokens > 0)
        monkeypatch.setattr(time, "time", lambda: wall() + jump)
        assert httpx.get(f"{server.url}/health").status_code == 200
        status = httpx.get(f"{server.url}/status.json").json()
    assert answer.result()["choices"][0]["finish_reason"] == "length"
    assert 0 <= status["uptime_seconds"] < 3600
    assert 0 <= status["latency_seconds"]["first token"]["p50"] < 3600


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("model"))


@pytest.fixture
def processes(folder: Path, tmp_path: Path) -> Iterator[Callable[[], tuple[subprocess.Popen[str], str]]]:
    """Starts `autodeploy serve` in a process of its own, with a cache that the starts of one test share."""
    started: list[subprocess.Popen[str]] = []
    environment = {
        **os.environ,
        "AUTODEPLOY_CACHE": str(tmp_path / "cache"),
        "AUTODEPLOY_NATIVE": "0",  # nothing is compiled here
        "PYTHONPATH": str(Path(autodeploy.__file__).parents[1]),
    }

    def start_one() -> tuple[subprocess.Popen[str], str]:
        command = [
            sys.executable,
            "-m",
            "autodeploy",
            "serve",
            str(folder),
            "--port",
            "0",
            "--served-model-name",
            "tiny",
        ]
        log = tmp_path / f"log-{len(started)}"
        with log.open("w") as errors:
            process = subprocess.Popen(command, stderr=errors, text=True, env=environment)
        started.append(process)
        wait_until(lambda: process.poll() is not None or "running on http" in log.read_text(), seconds=300)
        found = re.search(r"running on (http://\S+)", log.read_text())
        assert found is not None, log.read_text()
        return process, found[1]

    yield start_one
    for process in started:
        process.kill()
        process.wait(60)


@pytest.mark.slow
def test_a_killed_server_breaks_streams_and_leaves_nothing_behind(processes: Any, tmp_path: Path) -> None:
    body = {"prompt": [70, 71, 72], "max_tokens": 30, **GREEDY}
    process, url = processes()
    expected = httpx.post(f"{url}/v1/completions", json=body, timeout=120).json()["choices"][0]["text"]
    endless = {**body, "max_tokens": 200, "stream": True, "n": 4}
    with (
        pytest.raises(httpx.RemoteProtocolError),
        httpx.stream("POST", f"{url}/v1/completions", json=endless, timeout=120) as response,
    ):
        lines = response.iter_lines()
        assert next(lines).startswith("data: {")
        process.kill()
        assert "data: [DONE]" not in list(lines)
    assert process.wait(60) == -signal.SIGKILL
    left = [path for path in (tmp_path / "cache").rglob("*") if path.name.startswith(".")]
    left += [path for path in Path("/dev/shm").iterdir() if str(process.pid) in path.name]
    assert left == []
    again, url = processes()
    assert httpx.post(f"{url}/v1/completions", json=body, timeout=120).json()["choices"][0]["text"] == expected
    with httpx.stream("POST", f"{url}/v1/completions", json={**endless, "n": 1}, timeout=120) as response:
        lines = response.iter_lines()
        assert next(lines).startswith("data: {")
        again.terminate()  # and one that is asked to end lets what runs finish
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert again.wait(60) == -signal.SIGTERM
