"""Many streaming clients for a while, against a real server: every answer must be what the same request gets alone.

    python benchmarks/soak.py smollm2 --clients 500 --seconds 600 --output benchmarks/results

Answers are greedy, in float32. Prompts whose answer is a close call, where rounding alone could decide between two
tokens, are left out and counted. Ends with status 1 if an answer was lost or differed, or if the server's memory grew
in a run that is long enough to tell growth from warming up.
"""

import argparse
import asyncio
import json
import platform
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import psutil
from peers.process import Server

from autodeploy.bench import record
from autodeploy.packaged_models import model_path

WORDS = "river stone winter letter garden engine music paper window island number shadow market bridge"
CLOSE_CALL = 1e-3
"""Log-probabilities this close may change places when sums are added up in another order."""
MOST_GROWTH_BYTES_PER_MINUTE = 4 * 2**20
LONG_RUN_SECONDS = 300


def main(arguments: list[str] | None = None) -> int:
    """Run it and write the record; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--clients", type=int, default=500)
    parser.add_argument("--seconds", type=float, default=600, help="how long new requests are sent")
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/local"))
    given = parser.parse_args(arguments)
    flags = ["--dtype", "float32", "--max-num-seqs", "64", "--max-queued-requests", str(2 * given.clients)]
    command = [sys.executable, "-m", "autodeploy", "serve", model_path(given.model), "--port", "{port}", *flags]
    with tempfile.TemporaryDirectory() as scratch:
        log = Path(scratch) / "log"
        with Server(command, {}, log) as server:
            server.wait_until_ready("/ready", 600)
            results = asyncio.run(soak(server, given))
        if results["lost"]:
            print(log.read_text(encoding="utf-8"))
    passed = results["wrong"] == results["lost"] == results["left_in_engine"] == 0 and results["answers"] > 0
    if given.seconds >= LONG_RUN_SECONDS:
        passed = passed and results["memory_bytes_per_minute"] <= MOST_GROWTH_BYTES_PER_MINUTE
    found = {"benchmark": "soak", "passed": passed, "command": sys.argv, "results": results}
    found |= {"machine": record.machine(), "versions": record.versions()}
    given.output.mkdir(parents=True, exist_ok=True)
    path = given.output / f"soak_{platform.machine()}_{time.strftime('%Y%m%d-%H%M')}.json"
    path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(f"{'passed' if passed else 'NOT PASSED'}: {path}\n{json.dumps(results | {'memory_bytes': '...'})}")
    return 0 if passed else 1


async def soak(server: Server, given: Any) -> dict[str, Any]:
    """What every client saw, and the server's memory second by second."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=server.url, timeout=3600, limits=limits) as client:
        draw = random.Random(0)
        texts = [" ".join(draw.choices(WORDS.split(), k=draw.randint(4, 120))) for _ in range(given.prompts)]
        alone = {text: await answer(client, text, given.max_tokens) for text in texts}
        sure = [text for text in texts if alone[text]["margin"] > CLOSE_CALL]
        counts = {"answers": 0, "tokens": 0, "wrong": 0, "lost": 0}
        why_lost: list[str] = []
        memory: list[tuple[float, int]] = []
        began = time.monotonic()
        watcher = asyncio.create_task(watch(server.pid, memory, began))

        async def one_client(seed: int) -> None:
            choose = random.Random(seed)
            while time.monotonic() < began + given.seconds:
                text = choose.choice(sure)
                try:
                    got = await answer(client, text, given.max_tokens)
                except (httpx.HTTPError, ValueError) as error:
                    counts["lost"] += 1
                    why_lost.append(f"after {time.monotonic() - began:.1f} s: {error!r} from {error.__cause__!r}")
                    print(f"lost {why_lost[-1]}", flush=True)
                    continue
                counts["answers"] += 1
                counts["tokens"] += len(got["token_ids"])
                counts["wrong"] += got["token_ids"] != alone[text]["token_ids"] or got["text"] != alone[text]["text"]

        await asyncio.gather(*(one_client(seed) for seed in range(given.clients)))
        watcher.cancel()
        status = (await client.get("/status.json")).json()
    # The first half is for caches, pools and the allocator to fill.
    seconds, held = np.array(memory[len(memory) // 2 :]).T
    slope = float(np.polyfit(seconds, held, 1)[0]) if len(seconds) > 1 else 0.0
    left = status["running"] + status["waiting"] + int(status["state_usage_fraction"] > 0)
    result = {"clients": given.clients, "seconds": time.monotonic() - began, "close_calls": len(texts) - len(sure)}
    result |= counts | {"why_lost": why_lost, "left_in_engine": left, "preemptions": status["preemptions"]}
    return result | {"memory_bytes_per_minute": 60 * slope, "memory_bytes": [size for _, size in memory]}


async def answer(client: httpx.AsyncClient, text: str, max_tokens: int) -> dict[str, Any]:
    """One streamed answer: text, token ids, and the least distance between the two likeliest tokens.

    Raises:
        httpx.HTTPError, ValueError: it is not whole.
    """
    body = {"prompt": text, "max_tokens": max_tokens, "temperature": 0, "stream": True, "ignore_eos": True}
    body |= {"return_token_ids": True, "logprobs": 2}
    got: dict[str, Any] = {"text": "", "token_ids": [], "margin": float("inf")}
    is_whole = False
    async with client.stream("POST", "/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line:
                continue
            if is_whole or not line.startswith("data: "):
                raise ValueError(f"a line that does not belong there: {line[:200]}")
            if line == "data: [DONE]":
                is_whole = True
                continue
            choice = json.loads(line.removeprefix("data: "))["choices"][0]
            got["text"] += choice["text"]
            got["token_ids"] += choice["token_ids"]
            for likely in choice["logprobs"]["top_logprobs"]:
                best = sorted(likely.values(), reverse=True)
                got["margin"] = min([got["margin"], *(best[0] - other for other in best[1:2])])
    if not is_whole or len(got["token_ids"]) != max_tokens:
        raise ValueError(f"{len(got['token_ids'])} tokens instead of {max_tokens}, whole: {is_whole}")
    return got


async def watch(pid: int, memory: list[tuple[float, int]], began: float) -> None:
    """Note the memory that a process holds, every second."""
    process = psutil.Process(pid)
    while True:
        memory.append((time.monotonic() - began, process.memory_info().rss))
        await asyncio.sleep(1)


if __name__ == "__main__":
    sys.exit(main())
