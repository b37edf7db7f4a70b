"""Speculation: decoding sequences go in, drafts of their next tokens come out; `verify.py` decides what they are worth.

A proposer may draft anything: what it drafts changes how many tokens a step yields, never which.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

from autodeploy.config import SpeculativeOptions
from autodeploy.runtime.request import Sequence

MAX_CANDIDATES = 16
"""Earlier places looked at for the longest match."""


class Proposer(Protocol):
    """Drafts tokens."""

    def propose(self, wanted: Mapping[Sequence, int]) -> dict[Sequence, list[int]]:
        """Drafts, at most `wanted[sequence]` for each, none for those that are left out."""
        ...

    def release(self, sequence: Sequence) -> None:
        """Forget a finished sequence; no-op for one that is not known."""
        ...


def may_speculate(sequence: Sequence) -> bool:
    """Whether a running sequence decodes: all its tokens but the last one are computed.

    After a rejection, one with slot states first computes its accepted tokens again, without drafts: else they would be
    computed again with every further rejection.
    """
    return bool(sequence.slot) and len(sequence.token_ids) - sequence.num_computed_tokens == 1


@dataclass
class _Places:
    """Where each run of `shortest` tokens ended in a sequence.

    Attributes:
        latest: by the run, the position behind its latest occurrence.
        earlier: by position, the one behind the occurrence before; 0 when there was none.
    """

    latest: dict[tuple[int, ...], int] = field(default_factory=dict)
    earlier: list[int] = field(default_factory=lambda: [0])


class NgramProposer:
    """Drafts what followed the same tokens earlier in the sequence; of several places, that of the longest match."""

    def __init__(self, options: SpeculativeOptions) -> None:
        self._longest, self._shortest = options.prompt_lookup_max, options.prompt_lookup_min
        self._places: dict[Sequence, _Places] = {}

    def propose(self, wanted: Mapping[Sequence, int]) -> dict[Sequence, list[int]]:
        proposed = {sequence: self._draft(sequence, count) for sequence, count in wanted.items()}
        return {sequence: drafts for sequence, drafts in proposed.items() if drafts}

    def release(self, sequence: Sequence) -> None:
        self._places.pop(sequence, None)

    def _draft(self, sequence: Sequence, count: int) -> list[int]:
        tokens = sequence.token_ids
        place = self._longest_match(self._updated(sequence), tokens)
        if not place:
            return []
        # Behind the last token the text is taken to repeat: what follows `place` follows again.
        period = len(tokens) - place
        return [tokens[place + at % period] for at in range(count)]

    def _updated(self, sequence: Sequence) -> _Places:
        """The sequence's places, up to all but its last token."""
        places = self._places.setdefault(sequence, _Places())
        tokens, length = sequence.token_ids, self._shortest
        for end in range(len(places.earlier), len(tokens)):
            run = tuple(tokens[end - length : end]) if end >= length else None
            places.earlier.append(0 if run is None else places.latest.get(run, 0))
            if run is not None:
                places.latest[run] = end
        return places

    def _longest_match(self, places: _Places, tokens: list[int]) -> int:
        """The position behind the latest of the longest matches of the last tokens; 0 when there is none."""
        place = places.latest.get(tuple(tokens[-self._shortest :]), 0)
        best, best_length = 0, self._shortest - 1
        for _ in range(MAX_CANDIDATES):
            if not place or best_length >= self._longest:
                break
            length = self._match_length(tokens, place)
            if length > best_length:
                best, best_length = place, length
            place = places.earlier[place]
        return best

    def _match_length(self, tokens: list[int], place: int) -> int:
        most = min(self._longest, place)
        return next((at for at in range(most) if tokens[place - 1 - at] != tokens[-1 - at]), most)
