"""What the server spends per streamed token, from the engine's output to the socket, in microseconds of CPU time.

An engine that runs no model stands behind the real app and the real server; clients are another process, so that what
they spend is not counted.

    python benchmarks/http_cost.py [--streams 1 16 64] [--tokens 300] [--output benchmarks/results/local]

CPU time of the server's process, all threads, over all tokens of all streams: detokenising, JSON, events, HTTP, and the
hop from the engine's thread to the event loop.
"""

import argparse
import asyncio
import json
import logging
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Unpack

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from autodeploy.bench import record
from autodeploy.compile.program import Program
from autodeploy.runtime.async_engine import AsyncEngine
from autodeploy.runtime.request import RequestOptions, SamplingParams, TokenOutput
from autodeploy.runtime.stats import EngineStats
from autodeploy.runtime.tokenizer import Tokenizer
from autodeploy.server.app import create_app
from autodeploy.server.options import ServerOptions
from autodeploy.server.run import make_server
from autodeploy.server.served import ServedModel

PACE_SECONDS = 0.002
"""A step's length, so that tokens come one by one, as a model's do."""

LETTER = ord("a") - ord("!")
"""The token of the first of 26 letters, see `byte_tokenizer`."""

CLIENT = """
import asyncio, sys
async def stream(port, path, body):
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST {path} HTTP/1.1\\r\\nHost: here\\r\\nContent-Type: application/json\\r\\n"
    writer.write((head + f"Content-Length: {len(body)}\\r\\nConnection: close\\r\\n\\r\\n" + body).encode())
    answer = await reader.read()
    assert b" 200 " in answer[:20] and answer.count(b"data: ") > int(sys.argv[4]), answer[:400]
async def main():
    port, path, body = int(sys.argv[1]), sys.argv[2], sys.argv[5]
    await asyncio.gather(*(stream(port, path, body) for _ in range(int(sys.argv[3]))))
asyncio.run(main())
"""


class InstantEngine:
    """Gives every sequence one more token per step."""

    program: Program

    def __init__(self) -> None:
        self._left: dict[str, int] = {}

    def add_request(
        self, request_id: str, prompt: Sequence[int], params: SamplingParams, **_: Unpack[RequestOptions]
    ) -> None:
        self._left[request_id] = params.max_tokens or 1

    def abort_request(self, request_id: str, index: int | None = None) -> list[TokenOutput]:
        self._left.pop(request_id, None)
        return []

    def has_unfinished_requests(self) -> bool:
        return bool(self._left)

    def step(self) -> list[TokenOutput]:
        time.sleep(PACE_SECONDS)
        self._left = {name: left - 1 for name, left in self._left.items()}
        ended = [name for name, left in self._left.items() if left == 0]
        outputs = [
            TokenOutput(
                request_id=name, index=0, token_ids=[LETTER + left % 26], finish_reason=None if left else "length"
            )
            for name, left in self._left.items()
        ]
        for name in ended:
            del self._left[name]
        return outputs

    def stats(self) -> EngineStats:
        return EngineStats(num_running=len(self._left))


def byte_tokenizer() -> Tokenizer:
    """A token for each byte, those of visible ASCII first."""
    vocabulary = {token: at for at, token in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Backend(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    hf = PreTrainedTokenizerFast(tokenizer_object=backend)
    hf.chat_template = "{{ messages[0].content }}"
    return Tokenizer(hf)


async def measure(num_streams: int, num_tokens: int, path: str) -> float:
    """Microseconds of CPU time per token of `num_streams` streams of `num_tokens` tokens each."""
    engine = AsyncEngine(InstantEngine())
    served = ServedModel(engine=engine, names=["model"], tokenizer=byte_tokenizer(), max_model_len=10**6)
    server = make_server(create_app(served), served, ServerOptions(port=0))
    serving = asyncio.create_task(server.serve())
    while not server.started:
        await asyncio.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    prompt = {"messages": [{"role": "user", "content": "go"}]} if "chat" in path else {"prompt": "go"}
    body = json.dumps({"model": "model", "max_tokens": num_tokens, "stream": True, "ignore_eos": True, **prompt})
    command = [sys.executable, "-c", CLIENT, str(port), path, str(num_streams), str(num_tokens), body]

    async def run() -> float:
        began = time.process_time()
        client = await asyncio.to_thread(subprocess.run, command)
        client.check_returncode()
        return time.process_time() - began

    await run()
    seconds = await run()
    server.should_exit = True
    await serving
    engine.shutdown()
    return seconds / (num_streams * num_tokens) * 1e6


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write a record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--tokens", type=int, default=300)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/local"))
    given = parser.parse_args(arguments)
    logging.disable(logging.INFO)
    results: dict[str, Any] = {}
    for path in ("/v1/completions", "/v1/chat/completions"):
        results[path] = {str(count): asyncio.run(measure(count, given.tokens, path)) for count in given.streams}
        print(f"{path}: " + ", ".join(f"{count} streams {value:.0f}" for count, value in results[path].items()))
    raw = {
        "command": sys.argv,
        "tokens": given.tokens,
        "machine": record.machine(),
        "versions": record.versions(),
        "microseconds_per_token": results,
    }
    given.output.mkdir(parents=True, exist_ok=True)
    path = given.output / f"http-cost_{platform.machine()}_{datetime.now(UTC):%Y%m%d-%H%M}.json"
    path.write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
