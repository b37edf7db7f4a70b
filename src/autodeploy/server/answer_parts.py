"""What a model writes goes in piece by piece; its parts come out: thoughts, text, calls of tools.

However the pieces are cut, the parts joined are the same. Every character is looked at a bounded number of times: no
regular expression runs over a model's output.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

THOUGHT_BEGINS, THOUGHT_ENDS = "<think>", "</think>"


@dataclass(frozen=True)
class Text:
    """Content of the answer."""

    text: str


@dataclass(frozen=True)
class Thought:
    """What the model wrote before its answer, between `<think>` and `</think>`."""

    text: str


@dataclass(frozen=True)
class CallStart:
    """A call of a tool begins. `index` counts the calls of an answer."""

    index: int
    name: str


@dataclass(frozen=True)
class CallArguments:
    """More of a call's arguments: JSON as the model wrote it."""

    index: int
    text: str


Part = Text | Thought | CallStart | CallArguments


def split_at_marker(text: str, markers: Sequence[str]) -> tuple[str, str | None, str]:
    """(text before the first marker, the marker, text after it); without one, (text that is certain, None, the rest).

    The rest is then what may become a marker when more text comes.
    """
    found = [(at, marker) for marker in markers if (at := text.find(marker)) >= 0]
    if found:
        at, marker = min(found)
        return text[:at], marker, text[at + len(marker) :]
    longest = max(map(len, markers), default=1) - 1
    for length in range(min(longest, len(text)), 0, -1):
        if any(marker.startswith(text[-length:]) for marker in markers):
            return text[:-length], None, text[-length:]
    return text, None, ""


class CallReader(ABC):
    """Splits text into text and calls. What only looks like a call is given as text."""

    def __init__(self) -> None:
        self._held = ""
        self._space = ""  # white space that may turn out to stand before a call
        self._raw = ""  # of a call that may turn out to be none
        self.num_calls = 0

    def push(self, text: str) -> list[Part]:
        parts: list[Part] = []
        self._held += text
        while self._held and self._advance(parts):
            pass
        return parts

    @abstractmethod
    def finish(self) -> list[Part]:
        """What was held back. A call that is not whole stays as far as it came."""

    @abstractmethod
    def _advance(self, parts: list[Part]) -> bool:
        """One move; False when more text is needed."""

    def _text(self, text: str, parts: list[Part]) -> None:
        shown = (self._space + text).rstrip()
        self._space = (self._space + text)[len(shown) :]
        if shown:
            parts.append(Text(shown))

    def _last_text(self, text: str, parts: list[Part]) -> None:
        """Text that nothing follows: white space behind it is shown too, but for what stands behind calls."""
        self._text(text, parts)
        if self._space and not self.num_calls:
            parts.append(Text(self._space))


class ThoughtReader:
    """Splits an answer that begins with a thought.

    Args:
        is_open: the prompt has begun the thought already.
    """

    def __init__(self, *, is_open: bool):
        self._where = "thought" if is_open else "start"
        self._held = ""

    def push(self, text: str) -> list[Part]:
        parts: list[Part] = []
        self._held += text
        if self._where == "start":
            begun = self._held.lstrip()
            if begun.startswith(THOUGHT_BEGINS):
                self._where, self._held = "thought", begun.removeprefix(THOUGHT_BEGINS)
            elif not THOUGHT_BEGINS.startswith(begun):
                self._where = "text"
        if self._where == "thought":
            thought, marker, self._held = split_at_marker(self._held, [THOUGHT_ENDS])
            parts += [Thought(thought)] if thought else []
            self._where = "thought" if marker is None else "gap"
        if self._where == "gap":  # the blank lines between a thought and its answer
            self._held = self._held.lstrip()
            self._where = "text" if self._held else "gap"
        if self._where == "text" and self._held:
            parts.append(Text(self._held))
            self._held = ""
        return parts

    def finish(self) -> list[Part]:
        held, self._held = self._held, ""
        if not held:
            return []
        return [Thought(held) if self._where == "thought" else Text(held)]
