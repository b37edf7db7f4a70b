"""Reads the answers of one request: which parts they may have is decided once, then a reader follows each choice."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

from autodeploy.server.answer_parts import CallArguments, CallReader, CallStart, Part, Text, Thought, ThoughtReader
from autodeploy.server.element_calls import ElementCallReader
from autodeploy.server.tool_calls import ToolCallReader, ToolFormat


@dataclass(frozen=True, kw_only=True)
class AnswerPlan:
    """What an answer may hold besides text.

    Attributes:
        thoughts: look for a thought at the start.
        is_thinking: the prompt has begun the thought already.
        shows_thoughts: False leaves thoughts out of the answer.
        tool_format: how calls are written; None looks for none.
        tool_names: tools that the request offers.
        tool_parameters: JSON schemas of their arguments, by name.
        only_calls: the answer is a list of calls, and nothing else can be.
        only_arguments_of: the answer is the arguments of this tool, and nothing else can be.
        one_call: more calls than the first are left out.
    """

    thoughts: bool = False
    is_thinking: bool = False
    shows_thoughts: bool = True
    tool_format: ToolFormat | None = None
    tool_names: Collection[str] = ()
    tool_parameters: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    only_calls: bool = False
    only_arguments_of: str | None = None
    one_call: bool = False

    def reader(self) -> "AnswerReader":
        return AnswerReader(self)


class AnswerReader:
    """Splits one choice's text into parts, as it comes."""

    def __init__(self, plan: AnswerPlan):
        self._plan = plan
        self._thoughts = ThoughtReader(is_open=plan.is_thinking) if plan.thoughts else None
        self._calls: CallReader | None = None
        if plan.only_calls:
            self._calls = ToolCallReader("list", plan.tool_names, is_open=True)
        elif plan.tool_format == "elements":
            self._calls = ElementCallReader(plan.tool_parameters)
        elif plan.tool_format is not None:
            self._calls = ToolCallReader(plan.tool_format, plan.tool_names)
        self.num_calls = 0

    def push(self, text: str, *, is_last: bool = False) -> list[Part]:
        """The parts that are certain now; all of them when the text is at its end."""
        if self._plan.only_arguments_of is not None:
            begins: list[Part] = [] if self.num_calls else [CallStart(0, self._plan.only_arguments_of)]
            self.num_calls = 1
            return [*begins, *([CallArguments(0, text)] if text else [])]
        parts: list[Part] = [Text(text)] if text else []
        if self._thoughts is None and self._calls is None:
            return parts
        if self._thoughts is not None:
            parts = self._thoughts.push(text) + (self._thoughts.finish() if is_last else [])
        if self._calls is not None:
            read: list[Part] = []
            for part in parts:
                read += self._calls.push(part.text) if isinstance(part, Text) else [part]
            parts = read + (self._calls.finish() if is_last else [])
        return [part for part in parts if self._is_wanted(part)]

    def _is_wanted(self, part: Part) -> bool:
        if isinstance(part, Thought):
            return self._plan.shows_thoughts
        if isinstance(part, CallStart | CallArguments):
            if self._plan.one_call and part.index > 0:
                return False
            self.num_calls = max(self.num_calls, part.index + 1)
        return True
