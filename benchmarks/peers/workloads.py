"""What is asked of a server, and what is measured: a round's loads go in, figures by name come out.

The same seed gives every server the same requests in the same round, and no request comes twice.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from peers.http_load import Outcome, Request

SCHEMA = {
    "type": "array",
    "minItems": 200,
    "items": {
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 1, "maxLength": 12},
            "count": {"type": "integer"},
            "kind": {"enum": ["red", "green", "blue"]},
        },
        "required": ["name", "count", "kind"],
        "additionalProperties": False,
    },
}
"""Cannot be ended within the tokens that are asked for, so that guided and free answers are equally long."""

Send = Callable[[list[Request], int], Outcome]
"""Sends requests, so many at a time."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """Sizes in tokens, numbers of requests."""

    levels: tuple[int, ...] = (1, 4, 16, 32)
    requests_per_client: int = 3
    least_requests: int = 8
    prompts: tuple[int, int] = (64, 256)
    outputs: tuple[int, int] = (32, 64)
    shared_prefix: int = 1024
    prefix_requests: int = 16
    prefix_clients: int = 4
    repetitive: tuple[int, int] = (256, 128)
    guided_tokens: int = 96
    guided_clients: tuple[int, ...] = (1, 8)


SMOKE = Load(
    levels=(1, 2),
    requests_per_client=1,
    least_requests=2,
    prompts=(4, 8),
    outputs=(3, 5),
    shared_prefix=64,
    prefix_requests=3,
    prefix_clients=2,
    repetitive=(32, 8),
    guided_tokens=12,
    guided_clients=(2,),
)


class Workloads:
    """Every workload of one round.

    Args:
        num_ids: prompts are of token ids below.
        turn: number of the round.
    """

    def __init__(self, load: Load, num_ids: int, turn: int) -> None:
        self._load, self._num_ids, self._turn = load, num_ids, turn

    def names(self) -> list[str]:
        """In the order in which they are run."""
        levels = [f"clients_{level}" for level in self._load.levels]
        return [*levels, "prefix_apart", "prefix_shared", "repetitive", "guided"]

    def run(self, name: str, send: Send, guided: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, float]:
        """Figures of one workload."""
        load, source = self._load, random.Random(f"{self._turn} {name}")
        if name == "guided":
            return self._guided(send, guided, source)
        if name == "repetitive":
            length, wanted = load.repetitive
            outcome = send([Request(prompt=self._repeated(length, source), num_tokens=wanted) for _ in range(2)], 1)
        elif name.startswith("prefix"):
            common = self._prompt(load.shared_prefix, source)
            requests = []
            for _ in range(load.prefix_requests):
                begin = common if name == "prefix_shared" else self._prompt(load.shared_prefix, source)
                requests.append(Request(prompt=begin + self._prompt(load.prompts[0], source), num_tokens=16))
            if name == "prefix_shared":
                send(requests[:1], 1)  # the first to come computes what the others share
            outcome = send(requests[1:], load.prefix_clients)
        else:
            level = int(name.rpartition("_")[2])
            number = max(load.least_requests, level * load.requests_per_client)
            outcome = send([self._request(source) for _ in range(number)], level)
        return {f"{name}_{figure}": value for figure, value in outcome.figures().items()}

    def _guided(
        self, send: Send, guided: Callable[[dict[str, Any]], dict[str, Any]], source: random.Random
    ) -> dict[str, float]:
        """Seconds per token with and without a schema, and their ratio."""
        figures = {}
        for clients in self._load.guided_clients:
            prompts = [self._prompt(self._load.prompts[0], source) for _ in range(2 * clients)]
            seconds = {}
            for kind, fields in (("free", {}), ("guided", guided(SCHEMA))):
                requests = [
                    Request(
                        prompt=prompt,
                        num_tokens=self._load.guided_tokens,
                        is_guided=kind == "guided",
                        fields=fields,
                    )
                    for prompt in prompts
                ]
                seconds[kind] = send(requests, clients).figures()["per_token_p50_seconds"]
                figures[f"{kind}_{clients}_per_token_p50_seconds"] = seconds[kind]
            figures[f"guided_{clients}_overhead"] = seconds["guided"] / seconds["free"] - 1
        return figures

    def _request(self, source: random.Random) -> Request:
        prompt = self._prompt(source.randint(*self._load.prompts), source)
        return Request(prompt=prompt, num_tokens=source.randint(*self._load.outputs))

    def _prompt(self, length: int, source: random.Random) -> list[int]:
        return [source.randrange(1, self._num_ids) for _ in range(length)]

    def _repeated(self, length: int, source: random.Random) -> list[int]:
        """The same few tokens again and again: a model goes on with them, and drafts from the prompt are right."""
        return (self._prompt(12, source) * length)[:length]
