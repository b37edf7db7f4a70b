"""Rounds of one comparison: subjects and a load go in, samples per subject and figure come out."""

import random
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from peers.process import Peer, PeerError
from peers.subjects import Subject

SLOW_SECONDS = 20.0
"""What takes a subject longer, a start or a turn, it does once in a run and not in every round.

A turn that long in the round that is not counted counts: what a first turn costs besides is small beside it.
"""


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is asked, in tokens: one prompt and its answer, prompts to prefill, and many requests at once."""

    decode: tuple[int, int] = (128, 128)
    prefill: tuple[int, ...] = (1024, 2048)
    num_requests: int = 32
    prompts: tuple[int, int] = (32, 512)
    outputs: tuple[int, int] = (64, 128)


SMOKE = Load(decode=(8, 4), prefill=(16,), num_requests=3, prompts=(2, 6), outputs=(2, 4))


class Rounds:
    """Subjects that take turns, and what was measured of them.

    Attributes:
        samples: subject -> figure -> one value per round.
        tokens: subject -> the tokens of each decode run, the first round's too.
        failed: subject -> why it is not running any more.
    """

    def __init__(self, load: Load, num_ids: int) -> None:
        self.load, self._num_ids = load, num_ids
        self._source = random.Random(0)  # the same prompts for every precision, however many starts there are
        self._source_of_starts = random.Random(1)
        self._peers: dict[str, Peer] = {}
        self._slow: set[tuple[str, str]] = set()
        self.samples: dict[str, dict[str, list[float]]] = {}
        self.tokens: dict[str, list[list[int]]] = {}
        self.failed: dict[str, str] = {}

    def start(self, subjects: list[Subject], times: int, stack: ExitStack) -> None:
        """Launch every subject some times in turns, each to its first token; its last process stays as long as `stack`.

        A first start may find nothing that an earlier one has kept, so it counts by itself; it ends when it has kept
        what it wants to. A subject that starts slowly does so twice at most.
        """
        for turn in range(times):
            is_last = turn == times - 1
            for subject in subjects:
                is_slow = any(
                    (subject.name, figure) in self._slow for figure in ("first_start_seconds", "start_seconds")
                )
                if subject.name not in self.failed and (is_last or not is_slow):
                    self._launch(
                        subject, "start_seconds" if turn else "first_start_seconds", stack if is_last else None
                    )

    def _launch(self, subject: Subject, figure: str, stack: ExitStack | None) -> None:
        with ExitStack() as own:
            peer = own.enter_context(subject.launch())
            try:
                peer.ask("generate", prompts=[self._prompt(self.load.decode[0], self._source_of_starts)], lengths=[1])
                self._add(subject.name, {figure: peer.seconds_since_launch}, True, peer.seconds_since_launch)
                peer.ask("settle")
            except PeerError as error:
                self.failed[subject.name] = f"start: {error}"
                return
            if stack is not None:
                self._peers[subject.name] = peer
                stack.enter_context(own.pop_all())

    def once(self, counted: bool) -> None:
        """Every subject's turn at every figure; a round that is not counted has few requests at once."""
        load = self.load
        self._turn("decode", [(self._prompt(load.decode[0], self._source), load.decode[1])], counted)
        for length in load.prefill:
            self._turn(f"prefill_{length}", [(self._prompt(length, self._source), 1)], counted)
        if not counted:
            self._note_memory("one_peak_bytes")
        source = self._source
        many = [
            (self._prompt(source.randint(*load.prompts), source), source.randint(*load.outputs))
            for _ in range(load.num_requests if counted else 2)
        ]
        self._turn("requests", many, counted)

    def end(self) -> dict[str, Any]:
        """Peak memory after everything, and what subjects say about themselves."""
        self._note_memory("requests_peak_bytes")
        facts = {}
        for name, peer in self._peers.items():
            try:
                facts[name] = peer.ask("facts")["facts"]
            except PeerError as error:
                self.failed[name] = f"facts: {error}"
        return facts

    def _prompt(self, length: int, source: random.Random) -> list[int]:
        return [source.randrange(self._num_ids) for _ in range(length)]

    def _turn(self, figure: str, requests: list[tuple[list[int], int]], counted: bool) -> None:
        prompts, lengths = [prompt for prompt, _ in requests], [length for _, length in requests]
        for name, peer in list(self._peers.items()):
            if (name, figure) in self._slow:
                continue
            try:
                answer = peer.ask("generate", prompts=prompts, lengths=lengths)
            except PeerError as error:
                self.failed[name] = f"{figure}: {error}"
                self._peers.pop(name).end()
                continue
            values = _values(figure, prompts[0], lengths, answer)
            if figure == "decode":
                self.tokens.setdefault(name, []).append(answer["tokens"][0])
            seconds = answer["last_seconds"]
            counts = counted or (figure != "requests" and seconds > SLOW_SECONDS)  # there were fewer requests
            self._add(name, values, counts, seconds)

    def _add(self, name: str, values: dict[str, float], counted: bool, seconds: float) -> None:
        print(f"{name}: " + ", ".join(f"{key} {value:.4g}" for key, value in values.items()), flush=True)
        for key, value in values.items() if counted else ():
            self.samples.setdefault(name, {}).setdefault(key, []).append(value)
            if seconds > SLOW_SECONDS:
                self._slow.add((name, key))

    def _note_memory(self, figure: str) -> None:
        for name, peer in self._peers.items():
            self.samples[name][figure] = [peer.peak_bytes()]


def _values(figure: str, prompt: list[int], lengths: list[int], answer: dict[str, Any]) -> dict[str, float]:
    """Tokens per second: after the first ones, of the prompt, or of all answers together."""
    first, last = answer["first_seconds"], answer["last_seconds"]
    if figure == "decode":
        later = lengths[0] - answer["num_first"]  # several may come at once; all of them from a tiny model
        return {"decode": later / (last - first) if later else lengths[0] / last, "first_token_seconds": first}
    return {figure: sum(lengths) / last if figure == "requests" else len(prompt) / first}
