"""A load on a server: requests go in, all of one concurrency, and when each of their tokens came comes out.

The same client for every server: completions of token ids, streamed, greedy, past any end-of-text. A closed loop: each
of so many clients sends its next request as soon as it has its answer.
"""

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np

from peers.process import PeerError

TIMEOUT_SECONDS = 600


@dataclass(frozen=True, kw_only=True)
class Request:
    """A prompt as token ids, how many tokens are wanted, and further fields of its body.

    Guided answers end where their grammar does, and cannot go past an end-of-text; others do.
    """

    prompt: Sequence[int]
    num_tokens: int
    is_guided: bool = False
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Answer:
    """When the pieces of an answer came, in seconds from its request, and the tokens that they held together."""

    arrivals: Sequence[float]
    num_tokens: int


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Answers of a load, and the seconds that it took as a whole."""

    answers: Sequence[Answer]
    seconds: float

    def figures(self) -> dict[str, float]:
        """Rates, and percentiles of the time to a first token, between pieces, and per further token."""
        first = [answer.arrivals[0] for answer in self.answers]
        between = [float(gap) for answer in self.answers for gap in np.diff(answer.arrivals)]
        each = [(it.arrivals[-1] - it.arrivals[0]) / (it.num_tokens - 1) for it in self.answers if it.num_tokens > 1]
        found = {
            "requests_per_second": len(self.answers) / self.seconds,
            "tokens_per_second": sum(answer.num_tokens for answer in self.answers) / self.seconds,
        }
        for name, values in (("first_token", first), ("between_tokens", between), ("per_token", each)):
            for percentile in (50, 99):
                if values:
                    found[f"{name}_p{percentile}_seconds"] = float(np.percentile(values, percentile))
        return found


def run(url: str, model: str, requests: Sequence[Request], concurrency: int) -> Outcome:
    """Send all requests, in order, so many at a time.

    Raises:
        PeerError: one of them was not answered with as many tokens as it asked for.
    """
    return asyncio.run(_run(url, model, requests, concurrency))


async def _run(url: str, model: str, requests: Sequence[Request], concurrency: int) -> Outcome:
    answers: list[Answer] = []
    waiting = iter(requests)

    async def one_client(client: httpx.AsyncClient) -> None:
        for request in waiting:
            answers.append(await ask(client, model, request))

    # A connection each: one that is kept may be closed by the server while a request is on its way.
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=0)
    began = time.perf_counter()
    async with httpx.AsyncClient(base_url=url, timeout=TIMEOUT_SECONDS, limits=limits) as client:
        await asyncio.gather(*(one_client(client) for _ in range(concurrency)))
    return Outcome(answers=answers, seconds=time.perf_counter() - began)


async def ask(client: httpx.AsyncClient, model: str, request: Request) -> Answer:
    """Send one request and read its answer to the end."""
    body: dict[str, Any] = {
        "model": model,
        "prompt": list(request.prompt),
        "max_tokens": request.num_tokens,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if not request.is_guided:
        body["ignore_eos"] = True
    arrivals: list[float] = []
    num_tokens = 0
    began = time.perf_counter()
    try:
        async with client.stream("POST", "/v1/completions", json=body | request.fields) as response:
            if response.status_code != 200:
                raise PeerError(f"{response.status_code}: {(await response.aread())[:300]!r}")
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                now = time.perf_counter() - began
                event = json.loads(line[6:])
                if "error" in event:
                    raise PeerError(f"in the stream: {event['error']}")
                if event.get("choices") and (event["choices"][0].get("text") or event["choices"][0].get("token_ids")):
                    arrivals.append(now)
                num_tokens = (event.get("usage") or {}).get("completion_tokens", num_tokens)
    except httpx.HTTPError as error:
        raise PeerError(f"{type(error).__name__}: {error}") from error
    if num_tokens != request.num_tokens or not arrivals:
        raise PeerError(f"asked for {request.num_tokens} tokens, got {num_tokens} in {len(arrivals)} pieces")
    return Answer(arrivals=arrivals, num_tokens=num_tokens)
