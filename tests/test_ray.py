"""Replicas behind one address: they answer as one server does, prefixes find their replica, and one may be killed."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest

import autodeploy
from autodeploy.errors import ConfigError
from tests import tiny
from tests.server.running import wait_until

SCRIPT = """
import json, sys
import ray
from ray import serve
import autodeploy.ray
for attempt in range(3):
    try:
        ray.init(num_cpus=2, object_store_memory=80 * 2**20, include_dashboard=False)
        break
    except Exception as error:  # Ray gives its own processes 30 seconds, whatever else the machine does
        if attempt == 2 or "timed out during startup" not in str(error):
            raise
        ray.shutdown()
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[2])})
application = {"model": sys.argv[1], "num_replicas": 2, "served_model_name": "tiny", "routing": sys.argv[3]}
serve.run(autodeploy.ray.app(application))
print("ready", flush=True)
sys.stdin.read()
serve.shutdown()
ray.shutdown()
"""
PROMPTS = [[at + 1] * 70 for at in range(8)]
"""Longer than two pages each, so that a replica that has seen one finds it again."""


@pytest.fixture(scope="module", params=["hash", "prefix_tree"])
def routing(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def cluster(routing: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, psutil.Process]]:
    """The address of two replicas on this machine, and the process that owns all others."""
    pytest.importorskip("ray", reason="needs Ray Serve: pip install 'autodeploy[ray]'")
    model = tiny.save("llama", tmp_path_factory.mktemp("model"))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    environment = {**os.environ, "AUTODEPLOY_NATIVE": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    environment["PYTHONPATH"] = str(Path(autodeploy.__file__).parents[1])
    log = tmp_path_factory.mktemp("log") / "log"
    with log.open("w") as said:
        process = subprocess.Popen(
            [sys.executable, "-c", SCRIPT, str(model), str(port), routing],
            stdin=subprocess.PIPE,
            stdout=said,
            stderr=said,
            text=True,
            env=environment,
        )
    try:
        wait_until(lambda: process.poll() is not None or "ready\n" in log.read_text(), seconds=600)
        assert process.poll() is None, log.read_text()
        yield f"http://127.0.0.1:{port}", psutil.Process(process.pid)
    finally:
        process.communicate("", timeout=300)


def replicas(driver: psutil.Process) -> list[psutil.Process]:
    return [child for child in driver.children(recursive=True) if "ServeReplica:default:Replica" in child.name()]


def post(url: str, prompt: list[int], **fields: Any) -> httpx.Response:
    body = {"prompt": prompt, "max_tokens": 12, "temperature": 0, "ignore_eos": True, **fields}
    response = httpx.post(f"{url}/v1/completions", json=body, timeout=300)
    assert response.status_code == 200, response.text
    return response


def complete(url: str, prompt: list[int]) -> dict[str, Any]:
    return dict(post(url, prompt).json())


@pytest.mark.slow
def test_replicas_answer_as_one_server(cluster: tuple[str, psutil.Process]) -> None:
    url, driver = cluster
    wait_until(lambda: len(replicas(driver)) == 2, seconds=300)
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=300)
    assert [model.id for model in client.models.list()] == ["tiny"]
    question: Any = [{"role": "user", "content": "hello"}]
    asked: dict[str, Any] = {"model": "tiny", "messages": question, "max_tokens": 8, "temperature": 0}
    whole = client.chat.completions.create(**asked).choices[0].message.content
    chunks = list(client.chat.completions.create(**asked, stream=True))
    assert len(chunks) > 2 and "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model="tiny", prompt="x", temperature=-1)
    assert httpx.get(f"{url}/metrics").status_code == 404
    assert httpx.post(f"{url}/v1/completions", content=b"x" * (9 * 2**20)).status_code == 413


@pytest.mark.slow
def test_a_prefix_goes_where_it_is_known(routing: str, cluster: tuple[str, psutil.Process]) -> None:
    url, driver = cluster
    wait_until(lambda: len(replicas(driver)) == 2, seconds=300)
    first = [post(url, prompt, cache_salt="affinity") for prompt in PROMPTS]
    # A hash is of the whole beginning; a tree knows what a prompt has in common with an earlier one.
    more = [] if routing == "hash" else [90] * 20
    again = [post(url, prompt + more, cache_salt="affinity") for prompt in PROMPTS]
    served_by = [answer.headers["x-replica-id"] for answer in first]
    assert len(set(served_by)) == 2, "both replicas have something to do"
    assert [answer.headers["x-replica-id"] for answer in again] == served_by
    assert all(answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] >= 32 for answer in again)


@pytest.mark.slow
def test_requests_go_on_when_a_replica_is_killed(cluster: tuple[str, psutil.Process]) -> None:
    url, driver = cluster
    wait_until(lambda: len(replicas(driver)) == 2, seconds=300)
    expected = [complete(url, prompt)["choices"][0]["text"] for prompt in PROMPTS]
    seen: list[tuple[int, str]] = []
    streams: list[str] = []
    goes_on = True

    def ask(at: int) -> None:
        while goes_on:
            seen.append((at, complete(url, PROMPTS[at])["choices"][0]["text"]))

    def stream() -> None:
        body = {"prompt": PROMPTS[0], "max_tokens": 100, "temperature": 0, "ignore_eos": True, "stream": True}
        while goes_on:
            streams.append(httpx.post(f"{url}/v1/completions", json=body, timeout=300).text)

    with ThreadPoolExecutor(len(PROMPTS) + 1) as pool:
        tasks = [pool.submit(ask, at) for at in range(len(PROMPTS))] + [pool.submit(stream)]
        try:
            wait_until(lambda: len(seen) > 20 and len(streams) > 0, seconds=300)
            killed = replicas(driver)[0]
            killed.kill()
            count = len(seen)
            wait_until(lambda: len(seen) > count + 40, seconds=300)
        finally:
            goes_on = False
        for task in tasks:
            task.result()
    assert all(text == expected[at] for at, text in seen), "each answer is whole, and its own"
    assert {at for at, _ in seen[count:]} == set(range(len(PROMPTS))), "those of the dead replica are answered too"
    assert all(text.endswith("data: [DONE]\n\n") for text in streams), "a stream that breaks off says so"
    wait_until(lambda: len([each for each in replicas(driver) if each.pid != killed.pid]) == 2, seconds=300)
    assert [complete(url, prompt)["choices"][0]["text"] for prompt in PROMPTS] == expected


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Using extra keyword arguments on `Field`")  # Ray 2.60's own models
def test_what_an_application_cannot_be_told() -> None:
    pytest.importorskip("ray", reason="needs Ray Serve: pip install 'autodeploy[ray]'")
    from autodeploy.ray import app, prefix_key, prompt_of, prompt_text

    for arguments, message in (
        ({}, "needs a model"),
        ({"model": "m", "port": 1}, "port is Ray Serve's business"),
        ({"model": "m", "max_num_sequences": 3}, "max_num_sequences"),
        ({"model": "m", "max_body_bytes": 0}, "max_body_bytes"),
        ({"model": "m", "routing": "random"}, "'hash' or 'prefix_tree'"),
    ):
        with pytest.raises(ConfigError, match=message):
            app(arguments)
    assert prompt_of(b"{") is prompt_of(b"[1]") is None
    assert prefix_key(None) is prefix_key("") is prefix_key([]) is None
    begun = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    further = [*begun, {"role": "assistant", "content": "a"}]
    assert prompt_of(json.dumps({"messages": begun, "n": 2}).encode()) == begun
    assert prefix_key(begun) == prefix_key(further) != prefix_key(begun[:1])
    assert prefix_key("a") != prefix_key("b")
    assert prompt_text(further) == "s u a" and prompt_text([7, 8]) == "7 8" and prompt_text("x") == "x"
    assert prompt_text(None) == ""
