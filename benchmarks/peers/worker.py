"""A peer's process from inside: a job and requests come in as lines of JSON, tokens and their times go out.

It runs in the peer's own environment, so it needs the standard library alone. An adapter calls `serve(load)`:
`load(job)` returns an object with `generate(prompts, lengths, emit)`, which generates greedily, past any end-of-text,
and calls `emit(index, token_ids)` as soon as tokens of a request are there. More methods are optional: `settle()`
returns when the peer has reached its full speed, `facts()` says what it knows about itself. `score(tokens)` returns for
each token but the first its log-probability after those before it, and the likeliest token in its place.
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any


def serve(load: Callable[[dict[str, Any]], Any]) -> None:
    """Answer until stdin ends: the first line is the job, each further one a question."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever libraries print is not an answer
    peer = None
    for line in sys.stdin:
        try:
            if peer is None:
                peer = load(json.loads(line))
                continue
            answer = _answer(peer, json.loads(line))
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"[:500]}
        print(json.dumps(answer), file=answers, flush=True)


def _answer(peer: Any, question: dict[str, Any]) -> dict[str, Any]:
    if question["ask"] == "generate":
        return _generate(peer, question["prompts"], question["lengths"])
    name = question.pop("ask")
    method = getattr(peer, name, None)
    return {name: method(**question) if method else None}


def _generate(peer: Any, prompts: list[list[int]], lengths: list[int]) -> dict[str, Any]:
    """Seconds from the call to the first and to the last tokens, how many came first, and the tokens."""
    tokens: list[list[int]] = [[] for _ in prompts]
    arrivals: list[tuple[float, int]] = []
    start = time.perf_counter()

    def emit(index: int, token_ids: list[int]) -> None:
        arrivals.append((time.perf_counter() - start, len(token_ids)))
        tokens[index] += token_ids

    peer.generate(prompts, lengths, emit)
    got = [len(ids) for ids in tokens]
    if got != lengths:
        raise RuntimeError(f"asked for {lengths} tokens, got {got}")
    (first_seconds, num_first), (last_seconds, _) = arrivals[0], arrivals[-1]
    return {"first_seconds": first_seconds, "num_first": num_first, "last_seconds": last_seconds, "tokens": tokens}
