"""The client that loads servers: what it counts, how many it sends at once, and that no wrong answer counts."""

import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

Script = Callable[[str], Any]


class _Handler(BaseHTTPRequestHandler):
    """Streams as many events as the prompt's first number says, and counts who is there at once."""

    lock = threading.Lock()
    inside = 0
    most_inside = 0
    together: threading.Barrier
    bodies: list[dict[str, Any]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        kind = type(self)
        with kind.lock:
            kind.inside += 1
            kind.most_inside = max(kind.most_inside, kind.inside)
            kind.bodies.append(body)
        if body.get("meet"):
            kind.together.wait(20)
        number = body["prompt"][0]
        self.send_response(503 if number == 99 else 200)
        self.end_headers()
        events: list[Any] = [{"choices": [{"text": ""}]}]
        events += [{"choices": [{"text": "x"}]} for _ in range(number)]
        events.append({"choices": [], "usage": {"completion_tokens": number}})
        if number == 98:
            events = [{"error": {"message": "broken"}}]
        with kind.lock:
            kind.inside -= 1
        for event in events:
            self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
        self.wfile.write(b"data: [DONE]\n\n")

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def url() -> Iterator[str]:
    _Handler.inside = _Handler.most_inside = 0
    _Handler.together, _Handler.bodies = threading.Barrier(3), []
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_so_many_at_once_and_no_more(script: Script, url: str) -> None:
    load = script("peers.http_load")
    requests = [load.Request(prompt=[2], num_tokens=2, fields={"meet": True}) for _ in range(6)]
    outcome = load.run(url, "m", requests, 3)
    assert len(outcome.answers) == 6
    assert _Handler.most_inside == 3
    assert all(len(answer.arrivals) == 2 and answer.num_tokens == 2 for answer in outcome.answers)


def test_all_but_guided_answers_go_past_the_end_of_a_text(script: Script, url: str) -> None:
    load = script("peers.http_load")
    requests = [load.Request(prompt=[2], num_tokens=2, is_guided=is_guided) for is_guided in (False, True)]
    load.run(url, "m", requests, 1)
    assert [body.get("ignore_eos", False) for body in _Handler.bodies] == [True, False]


def test_figures_follow_from_arrivals(script: Script) -> None:
    load = script("peers.http_load")
    slow = load.Answer(arrivals=[1.0, 1.5, 3.0], num_tokens=5)
    quick = load.Answer(arrivals=[0.5], num_tokens=1)
    figures = load.Outcome(answers=[slow, quick], seconds=4.0).figures()
    assert figures["requests_per_second"] == 0.5
    assert figures["tokens_per_second"] == 1.5
    assert figures["first_token_p50_seconds"] == 0.75
    assert figures["between_tokens_p50_seconds"] == 1.0
    assert figures["per_token_p99_seconds"] == 0.5


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([1], "asked for 2 tokens, got 1 in 1 pieces"),
        ([99], "503: "),
        ([98], "in the stream: {'message': 'broken'}"),
    ],
)
def test_a_wrong_answer_is_an_error(script: Script, url: str, prompt: list[int], message: str) -> None:
    load, process = script("peers.http_load"), script("peers.process")
    with pytest.raises(process.PeerError) as caught:
        load.run(url, "m", [load.Request(prompt=prompt, num_tokens=2)], 1)
    assert message in str(caught.value)


def test_a_server_that_is_not_there_is_an_error_too(script: Script) -> None:
    load, process = script("peers.http_load"), script("peers.process")
    with pytest.raises(process.PeerError, match="ConnectError"):
        load.run("http://127.0.0.1:1", "m", [load.Request(prompt=[1], num_tokens=1)], 1)


def test_workloads_are_the_same_for_every_server(script: Script) -> None:
    workloads, load = script("peers.workloads"), script("peers.http_load")

    def asked(turn: int) -> list[Any]:
        seen: list[Any] = []

        def send(requests: list[Any], concurrency: int) -> Any:
            seen.append((tuple(tuple(it.prompt) for it in requests), concurrency))
            return load.Outcome(answers=[load.Answer(arrivals=[0.1, 0.2], num_tokens=2)], seconds=1.0)

        own = workloads.Workloads(workloads.SMOKE, 256, turn)
        for name in own.names():
            own.run(name, send, lambda schema: {"json_schema": schema})
        return seen

    first = asked(1)
    assert asked(1) == first
    assert asked(2) != first
    prompts = [prompt for sent, _ in first for prompt in sent]
    (shared,) = [
        sent for sent, _ in first if len({prompt[:64] for prompt in sent}) == 1 and len(sent) == 2 and len(sent[0]) > 64
    ]
    assert shared[0] != shared[1]
    assert max(max(prompt) for prompt in prompts) < 256
