"""What an operator relies on: keys, TLS, CORS, request ids, logs, readiness, draining, metrics, limits."""

import json
import logging
import re
import socket
import ssl
import threading
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fastapi.testclient import TestClient
from prometheus_client.parser import text_string_to_metric_families

from autodeploy.errors import ConfigError
from autodeploy.runtime.async_engine import AsyncEngine
from autodeploy.server import logs, prompts
from autodeploy.server.app import create_app
from autodeploy.server.options import parse_server_options
from autodeploy.server.served import ServedModel
from autodeploy.server.time_limit import OutOfTimeError, run_within
from tests.runtime.fake_engine import FakeEngine
from tests.runtime.tiny_tokenizers import byte_level
from tests.server.running import (
    ANSWER_IDS,
    EOS,
    MESSAGES,
    Serve,
    Start,
    assert_error,
    random_engine,
    wait_until,
)

TLS = Path(__file__).parent / "tls"


def test_keys(start: Start) -> None:
    server = start(api_key=("right", "other"))
    body = {"prompt": "x"}
    bad = ("", "wrong", "Bearer", "Bearer wrong", "Basic right", "right", "Bearer righ", "Bearer right2", "Bearer é")
    for key in bad:
        headers = {"Authorization": key.encode()} if key else {}
        response = httpx.post(f"{server.url}/v1/completions", json=body, headers=headers)  # type: ignore[arg-type]
        assert_error(response, 401, "needs a key")
        assert response.headers["www-authenticate"] == "Bearer"
        assert response.json()["error"]["code"] == "invalid_api_key"
    closed = ("/metrics", "/status.json", "/openapi.json", "/v1/models", "/tokenize", "/nowhere", "/health%2f..%2fv1")
    for path in closed:
        assert httpx.get(server.url + path).status_code == 401, path
    for path in ("/health", "/ping", "/ready", "/status"):
        assert httpx.get(server.url + path).status_code == 200, path
    for key in ("right", "other"):
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key=key, max_retries=0)
        assert client.completions.create(model="tiny", prompt="x").choices
    with pytest.raises(openai.AuthenticationError):
        server.client().models.list()


def test_every_key_is_compared_whole(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[int, int]] = []

    def compare(one: bytes, other: bytes) -> bool:
        compared.append((len(one), len(other)))
        return one == other

    monkeypatch.setattr("autodeploy.server.access.hmac.compare_digest", compare)
    server = start(api_key=("a", "a much longer key"))
    for key in ("a", "b", "c" * 1000):
        httpx.get(f"{server.url}/v1/models", headers={"Authorization": f"Bearer {key}"})
    assert compared == [(32, 32)] * 6


def test_tls(start: Start) -> None:
    server = start(ssl_keyfile=str(TLS / "localhost.key"), ssl_certfile=str(TLS / "localhost.crt"))
    trusted = ssl.create_default_context(cafile=str(TLS / "localhost.crt"))
    assert httpx.get(f"{server.url}/health", verify=trusted).status_code == 200
    with pytest.raises(httpx.TransportError):
        httpx.get(server.url.replace("https", "http") + "/health")


def test_other_pages_may_not_call_unless_they_are_named(start: Start) -> None:
    origin = {"Origin": "https://page.example"}
    asking = {
        **origin,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization, x-stainless-os",
    }
    closed = start()
    assert "access-control-allow-origin" not in httpx.get(f"{closed.url}/v1/models", headers=origin).headers
    assert httpx.options(f"{closed.url}/v1/completions", headers=asking).status_code == 405
    opened = start(allowed_origins=("https://page.example",), api_key=("k",))
    preflight = httpx.options(f"{opened.url}/v1/completions", headers=asking)
    assert preflight.status_code == 200
    assert preflight.headers["access-control-allow-origin"] == "https://page.example"
    other = httpx.options(f"{opened.url}/v1/completions", headers={**asking, "Origin": "https://other.example"})
    assert "access-control-allow-origin" not in other.headers
    assert_error(other, 400, "Disallowed CORS origin")


def test_request_ids_are_taken_or_made(start: Start) -> None:
    server = start()
    given = httpx.get(f"{server.url}/version", headers={"X-Request-Id": "abc-1"})
    assert given.headers["x-request-id"] == "abc-1"
    made = {httpx.get(f"{server.url}/nowhere").headers["x-request-id"] for _ in range(2)}
    assert len(made) == 2
    bad = httpx.get(f"{server.url}/version", headers={"X-Request-Id": "a b" * 100})
    assert len(bad.headers["x-request-id"]) == 32
    for headers in ({}, {"X-Request-Id": "abc-2"}):
        answer = server.post("/v1/completions", {"prompt": "x"}, headers=headers)
        assert answer.json()["id"] == f"cmpl-{answer.headers['x-request-id']}", "what a client reports is in the log"


@pytest.mark.parametrize("log_format", ["json", "text"])
def test_a_request_is_one_line(start: Start, log_format: str, caplog: pytest.LogCaptureFixture) -> None:
    server = start()
    formatter = logs.JsonLines() if log_format == "json" else logs.TextLines()
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(formatter.format(record))  # type: ignore[method-assign]
    logs.logger.addHandler(handler)
    try:
        httpx.post(f"{server.url}/v1/completions", json={"prompt": "x"}, headers={"X-Request-Id": "abc-1"})
        httpx.get(f"{server.url}/no%0Awhere%1b", headers={"X-Request-Id": "abc-2"})
        wait_until(lambda: len(lines) == 2)
    finally:
        logs.logger.removeHandler(handler)
    assert not any("\n" in line or "\x1b" in line for line in lines)
    if log_format == "json":
        first, second = map(json.loads, lines)
        facts = (first["request_id"], first["method"], first["path"], first["status"], first["level"])
        assert facts == ("abc-1", "POST", "/v1/completions", 200, "info") and first["seconds"] >= 0
        assert (second["request_id"], second["status"]) == ("abc-2", 404)
    else:
        assert "INFO [abc-1]" in lines[0] and "POST /v1/completions 200" in lines[0]


@pytest.mark.parametrize("sent", [b"no http\r\n\r\n", b"GET /health HTTP/1.1\r\nHost: x\r\nContent-Length: a\r\n\r\n"])
def test_what_is_no_http_gets_an_error_of_the_same_shape(serve: Serve, sent: bytes) -> None:
    url, _, _ = serve(FakeEngine())
    with socket.create_connection(("127.0.0.1", int(url.rpartition(":")[2])), timeout=10) as connection:
        connection.sendall(sent)
        head, _, body = b"".join(iter(lambda: connection.recv(65536), b"")).partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 400") and b"application/json" in head
    assert json.loads(body)["error"]["type"] == "invalid_request_error"


def test_an_unexpected_fault_is_told_without_its_text(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: object) -> Any:
        raise RuntimeError("secret 0x7f00")

    monkeypatch.setattr("autodeploy.server.app._Routes.show_version", broken)
    server = start()
    response = httpx.get(f"{server.url}/version", headers={"X-Request-Id": "abc-1"})
    assert_error(response, 500, "internal error")
    assert "secret" not in response.text and response.headers["x-request-id"] == "abc-1"
    assert httpx.get(f"{server.url}/health").status_code == 200


def test_metrics_have_vllms_names(start: Start) -> None:
    server = start()
    server.post("/v1/completions", {"prompt": [1, 2, 3], "max_tokens": 4, "n": 2})
    server.post("/v1/chat/completions", {"messages": MESSAGES})
    text = httpx.get(f"{server.url}/metrics").text
    label = 'model_name="tiny"'
    for line in (
        f"vllm:time_to_first_token_seconds_count{{{label}}} 3.0",
        f"vllm:e2e_request_latency_seconds_count{{{label}}} 2.0",
        f"vllm:inter_token_latency_seconds_count{{{label}}} {2 * 3 + len(ANSWER_IDS)}.0",
        f"vllm:request_queue_time_seconds_count{{{label}}} 2.0",
        f"vllm:request_prompt_tokens_count{{{label}}} 2.0",
        f"vllm:request_generation_tokens_sum{{{label}}} {2 * 4 + len(ANSWER_IDS) + 1}.0",
        f'vllm:request_success_total{{finished_reason="length",{label}}} 2.0',
        f'vllm:request_success_total{{finished_reason="stop",{label}}} 1.0',
        f"vllm:request_params_n_sum{{{label}}} 3.0",
        f"vllm:request_params_max_tokens_sum{{{label}}} 4.0",
        f"vllm:request_max_num_generation_tokens_sum{{{label}}} {4 + len(ANSWER_IDS) + 1}.0",
        f"vllm:request_prefill_kv_computed_tokens_count{{{label}}} 2.0",
        'http_requests_total{handler="/v1/completions",method="POST",status="2xx"} 1.0',
        "process_resident_memory_bytes",
        "vllm:prefix_cache_queries_total",
        "vllm:prefix_cache_hits_total",
    ):
        assert line in text, line

    page = (Path(__file__).resolve().parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
    for family in text_string_to_metric_families(text):  # as a scraper reads it
        name = f"{family.name}_total" if family.type == "counter" else family.name
        assert f"`{name}`" in page or name.startswith("process_") or name.endswith("_created"), name

    def total(name: str) -> float:
        (value,) = re.findall(rf"^vllm:{name}_seconds_sum{{{label}}} (.*)$", text, re.MULTILINE)
        return float(value)

    assert total("request_queue_time") + total("request_inference_time") == pytest.approx(total("e2e_request_latency"))
    parts = total("request_prefill_time") + total("request_decode_time")
    assert parts == pytest.approx(total("request_inference_time")) and total("request_time_per_output_token") > 0
    status = httpx.get(f"{server.url}/status.json").json()
    assert status["latency_seconds"]["first token"]["p50"] <= status["latency_seconds"]["first token"]["p99"]
    assert status["is_healthy"] and status["models"] == ["tiny", "alias"]


def test_what_is_refused_and_who_goes_away_is_counted(start: Start) -> None:
    server = start(FakeEngine(max_queued=1, step_seconds=0.01))
    body = {"prompt": "x", "n": 2, "stream": True, "max_tokens": 10**6}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60):
        assert server.post("/v1/completions", {"prompt": "x"}).status_code == 429
    httpx.request("BREW", f"{server.url}/v1/completions")
    httpx.get(f"{server.url}/made/up")
    label = 'model_name="tiny"'
    lines = (
        f'vllm:admission_rejections_total{{{label},reason="max_queued_requests"}} 1.0',
        f'vllm:request_success_total{{finished_reason="abort",{label}}} 2.0',
        'http_requests_total{handler="/v1/completions",method="POST",status="4xx"} 1.0',
        'http_requests_total{handler="/v1/completions",method="other",status="4xx"} 1.0',
        'http_requests_total{handler="none",method="GET",status="4xx"} 1.0',
    )
    wait_until(lambda: all(line in httpx.get(f"{server.url}/metrics").text for line in lines))


def test_the_number_of_sequences_is_limited(start: Start) -> None:
    server = start(max_sequences_per_request=2)
    assert_error(server.post("/v1/completions", {"prompt": ["a", "b"], "n": 2}), 400, "more than 2", "prompt")
    assert_error(server.post("/v1/chat/completions", {"messages": MESSAGES, "n": 3}), 400, "more than 2", "n")
    assert server.post("/v1/chat/completions", {"messages": MESSAGES, "n": 2}).status_code == 200


def test_requests_that_take_too_long_end(start: Start) -> None:
    server = start(random_engine(), request_timeout_seconds=0.01)
    body = {"prompt": "x", "max_tokens": 100_000, "ignore_eos": True}
    choice = server.post("/v1/completions", body).json()["choices"][0]
    assert choice["finish_reason"] == "timeout" and "timeout" in choice["stop_reason"]


def test_a_slow_template_is_ended(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "TEMPLATE_SECONDS", 0.2)
    endless = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    server = start(tokenizer=byte_level(chat_template=endless))
    assert_error(server.post("/v1/chat/completions", {"messages": MESSAGES}), 400, "too slow", "messages")
    assert server.post("/tokenize", {"prompt": "x"}).status_code == 200, "the tokenizer is free again"


def test_an_operators_template_is_used_instead_of_the_models(start: Start, tmp_path: Path) -> None:
    file = tmp_path / "chat.jinja"
    file.write_text("{% for message in messages %}<{{ message.content }}>{% endfor %}", encoding="utf-8")
    server = start(tokenizer=byte_level(), chat_template=str(file))
    tokens = server.post("/tokenize", {"messages": MESSAGES}).json()["tokens"]
    assert server.post("/detokenize", {"tokens": tokens}).json() == {"prompt": "<hello>"}
    for text in ("{% for %}", "{{ messages[0].nothing.at_all }}"):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(ConfigError, match="chat_template cannot write"):
            start(tokenizer=byte_level(), chat_template=str(file))
    with pytest.raises(ConfigError, match="needs a tokenizer"):
        start(tokenizer=None, chat_template=str(file))


def test_run_within() -> None:
    assert run_within(5, lambda: 3) == 3
    with pytest.raises(KeyError):
        run_within(5, lambda: {}["x"])
    ended = threading.Event()

    def for_ever() -> None:
        try:
            while True:
                pass
        finally:
            ended.set()

    with pytest.raises(OutOfTimeError):
        run_within(0.05, for_ever)
    assert ended.wait(10)


def test_what_runs_may_finish(serve: Serve) -> None:
    fake = FakeEngine(ANSWER_IDS, eos_id=EOS)
    fake.hold.set()
    url, server, served = serve(fake, drain_timeout_seconds=60)
    assert httpx.get(f"{url}/ready").status_code == 200
    answers: list[httpx.Response] = []
    caller = threading.Thread(target=lambda: answers.append(httpx.post(f"{url}/v1/completions", json={"prompt": "x"})))
    caller.start()
    wait_until(lambda: bool(fake.added))
    with httpx.Client(base_url=url) as open_connection:
        open_connection.get("/health")
        server.should_exit = True  # what the signal does
        wait_until(lambda: served.lifecycle.is_draining)
        fake.hold.clear()
        caller.join(20)
    assert answers[0].json()["choices"][0]["finish_reason"] in ("stop", "length")
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{url}/health")


def test_what_takes_too_long_ends_with_an_error(serve: Serve) -> None:
    fake = FakeEngine(step_seconds=0.005)
    url, server, _ = serve(fake, drain_timeout_seconds=0.1)
    body = {"prompt": "x", "max_tokens": 10**6, "stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{url}/v1/completions", json=body, timeout=30) as response:
        lines = response.iter_lines()
        next(lines)
        server.should_exit = True
        rest = [line for line in lines if line]
    assert "the engine has stopped" in rest[-2] and rest[-1] == "data: [DONE]"


def test_not_ready_while_draining_but_healthy() -> None:
    engine = AsyncEngine(FakeEngine())
    served = ServedModel(engine=engine, names=["tiny"])
    with TestClient(create_app(served)) as client:
        assert client.get("/ready").status_code == 200
        served.lifecycle.is_draining = True
        assert client.get("/ready").json()["error"]["code"] == "draining"
        assert client.get("/ready").status_code == 503 and client.get("/health").status_code == 200
        engine.shutdown()
        assert client.get("/health").status_code == 503


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"port": 70_000}, "port"),
        ({"port": True}, "port"),
        ({"host": ""}, "host"),
        ({"max_body_bytes": 0}, "max_body_bytes"),
        ({"max_sequences_per_request": 1000}, "max_sequences_per_request"),
        ({"drain_timeout_seconds": -1}, "drain_timeout_seconds"),
        ({"log_format": "xml"}, "log_format"),
        ({"api_key": [""]}, "api_key"),
        ({"api_key": "é"}, "api_key"),
        ({"ssl_keyfile": "x"}, "belong together"),
        ({"chat_template": "/no/template"}, "no file"),
        ({"chat_template": 3}, "no file"),
        ({"ssl_keyfile": "/no/key", "ssl_certfile": "/no/cert"}, "no file"),
        ({"prot": 1}, "unknown server option 'prot'"),
    ],
)
def test_bad_options_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_server_options(values)
    assert parse_server_options({"api_key": "k", "allowed_origins": ["a", "b"]}).allowed_origins == ("a", "b")


def test_the_log_config_is_one_that_logging_takes(capsys: pytest.CaptureFixture[str]) -> None:
    import logging.config

    config = logs.log_config("json")
    config["loggers"] = {"autodeploy.test_of_logs": config["loggers"]["autodeploy"]}
    logging.config.dictConfig(config)
    try:
        raise ValueError("x\ny")
    except ValueError:
        logging.getLogger("autodeploy.test_of_logs").exception("what\nhappened")
    (line,) = capsys.readouterr().err.splitlines()
    assert json.loads(line)["message"] == "what\nhappened" and "ValueError" in json.loads(line)["exception"]
    assert logs.TextLines().format(logging.makeLogRecord({"msg": "a\nb", "name": "n"})).endswith("n: a\\nb")


def test_idle_connections_are_left_for_clients_to_close(serve: Serve) -> None:
    _, server, _ = serve(FakeEngine(ANSWER_IDS, eos_id=EOS))
    longest = httpx.Limits().keepalive_expiry
    assert longest is not None
    assert server.config.timeout_keep_alive > 2 * max(longest, 15)  # the latter is aiohttp's
