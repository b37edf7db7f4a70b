"""Calls of tools in a model's text: five ways of writing them, told apart by the model's own chat template.

tags       <tool_call>{"name": "f", "arguments": {...}}</tool_call>, any number of them
list       [TOOL_CALLS][{"name": "f", "arguments": {...}}, ...] or [TOOL_CALLS]f[ARGS]{...};
           also <TOOLCALL>[...]</TOOLCALL>
sections   <｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{...}<｜tool▁call▁end｜><｜tool▁calls▁end｜>,
           also with `function` before the separator, and the name and a block of JSON after it
bare       {"name": "f", "parameters": {...}} as the whole answer, several of them with `;` between
elements   <tool_call><function=f><parameter=p>...</parameter></function></tool_call>, read by `element_calls.py`
"""

from collections.abc import Collection
from typing import Literal

from autodeploy.server.answer_parts import CallArguments, CallReader, CallStart, Part, split_at_marker
from autodeploy.server.element_calls import FUNCTION, PARAMETER
from autodeploy.server.json_scanner import MAX_NAME, CallScanner, ValueScanner

ToolFormat = Literal["tags", "list", "sections", "bare", "elements"]

_TAG, _TAG_END = "<tool_call>", "</tool_call>"
_LISTS, _LIST_END, _LIST_ARGUMENTS = ("[TOOL_CALLS]", "<TOOLCALL>"), "</TOOLCALL>", "["
_SECTION, _SECTION_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
_CALL, _SEPARATOR, _CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"
_PYTHON_TAG = "<|python_tag|>"

_BEGINS: dict[ToolFormat, tuple[str, ...]] = {"tags": (_TAG,), "list": _LISTS, "sections": (_SECTION,), "bare": ()}
_ENDS: dict[ToolFormat, tuple[str, ...]] = {"tags": (_TAG_END,), "list": (_LIST_END,)}
"""What only ends a call, and is no text behind one."""


def tool_format(template: str) -> ToolFormat | None:
    """How a model with this chat template writes calls; None for a template that has no tools."""
    if "tools" not in template:
        return None
    if FUNCTION in template and PARAMETER in template:
        return "elements"
    if _TAG in template:
        return "tags"
    if any(begin in template for begin in _LISTS):
        return "list"
    return "sections" if _SECTION in template else "bare"


class ToolCallReader(CallReader):
    """Reads calls whose arguments are JSON.

    Args:
        names: tools that the request offers; bare objects of other names are text.
        is_open: the text begins where calls are listed.
    """

    def __init__(self, form: ToolFormat, names: Collection[str], *, is_open: bool = False):
        super().__init__()
        self._form = form
        self._names = names
        self._where = "list" if is_open else "bare" if form == "bare" else "text"
        self._call: CallScanner | None = None
        self._arguments: ValueScanner | None = None
        self._is_started = False

    def finish(self) -> list[Part]:
        parts: list[Part] = []
        if self._call is not None and not self._is_started:
            self._give_up(parts)
        held, self._held = self._held, ""
        if self._where in ("text", "bare"):
            self._last_text(held, parts)
        return parts

    def _advance(self, parts: list[Part]) -> bool:
        if self._call is not None or self._arguments is not None:
            self._read_call(parts)
            return True
        return {
            "text": self._read_text,
            "bare": self._read_bare,
            "list": self._read_list,
            "section": self._read_section,
            "head": self._read_head,
        }[self._where](parts)

    def _read_text(self, parts: list[Part]) -> bool:
        ends = _ENDS.get(self._form, ()) if self.num_calls else ()
        before, marker, self._held = split_at_marker(self._held, (*_BEGINS[self._form], *ends))
        self._text(before, parts)
        if marker is None:
            return False
        self._raw, self._space = self._space + marker, ""
        if marker in ends:
            return True
        if self._form == "tags":
            self._call = CallScanner()
        else:
            self._where = "list" if self._form == "list" else "section"
        return True

    def _read_bare(self, parts: list[Part]) -> bool:
        begun = self._held.lstrip(" \t\n\r;" if self.num_calls else " \t\n\r")
        if begun.startswith(_PYTHON_TAG):
            self._held = begun.removeprefix(_PYTHON_TAG)
        elif begun.startswith("{"):
            self._raw, self._held, self._call = "", begun, CallScanner()
        elif begun and not _PYTHON_TAG.startswith(begun):
            self._where = "text"
        else:
            return False
        return True

    def _read_list(self, parts: list[Part]) -> bool:
        """After [TOOL_CALLS]: a list of objects, or a name."""
        self._held = self._held.lstrip(" \t\n\r,")
        if not self._held:
            return False
        if self._held.startswith("["):
            self._held = self._held[1:]
        elif self._held.startswith("{"):
            self._raw, self._call = "", CallScanner()
        elif self._held.startswith("]"):
            self._held, self._where = self._held[1:], "text"
        else:
            self._where = "head"
        return True

    def _read_section(self, parts: list[Part]) -> bool:
        _, marker, self._held = split_at_marker(self._held, (_CALL, _SECTION_END))
        if marker is not None:
            self._where = "head" if marker == _CALL else "text"
        return marker is not None

    def _read_head(self, parts: list[Part]) -> bool:
        """A name before its arguments, up to the brace that opens them."""
        head, brace, rest = self._held.partition("{")
        if not brace and len(head) <= 4 * MAX_NAME:
            return False
        name = head.partition(_SEPARATOR if self._form == "sections" else _LIST_ARGUMENTS)[0].strip()
        if name == "function" and self._form == "sections":
            name = head.partition(_SEPARATOR)[2].strip().partition("\n")[0].strip()
        if not brace or not name or len(name) > MAX_NAME:
            self._where = "text"
            self._text(self._raw + head, parts)
            self._held = brace + rest
            return True
        self._start(name, parts)
        self._arguments, self._held = ValueScanner(), brace + rest
        return True

    def _read_call(self, parts: list[Part]) -> None:
        """Take characters until the call ends or the text does."""
        taken = 0
        for taken, character in enumerate(self._held, 1):  # noqa: B007
            if self._call is not None:
                self._call.take(character)
                if self._call.is_done or self._call.is_bad:
                    break
            elif self._arguments is not None and self._arguments.take(character) and self._arguments.is_done:
                break
        fresh, self._held = self._held[:taken], self._held[taken:]
        if self._call is None:
            parts.append(CallArguments(self.num_calls - 1, fresh))
            if self._arguments is not None and self._arguments.is_done:
                self._arguments = None
                self._where = "section" if self._form == "sections" else "text"
            return
        self._raw += fresh if not self._is_started else ""
        self._follow(self._call, parts)

    def _follow(self, call: CallScanner, parts: list[Part]) -> None:
        """Tell what is new of an object, if it is a call."""
        if not self._is_started and call.name is not None and not call.is_bad:
            if self._form == "bare" and call.name not in self._names:
                self._give_up(parts)
                return
            self._start(call.name, parts)
            self._is_started = True
        if self._is_started:
            arguments = call.arguments()
            parts += [CallArguments(self.num_calls - 1, arguments)] if arguments else []
        if call.is_done or call.is_bad:
            if self._is_started:
                self._call, self._is_started = None, False
            else:
                self._give_up(parts)

    def _start(self, name: str, parts: list[Part]) -> None:
        self._space = ""
        parts.append(CallStart(self.num_calls, name))
        self.num_calls += 1

    def _give_up(self, parts: list[Part]) -> None:
        """It was no call."""
        self._call = None
        self._where = "text"
        self._text(self._raw, parts)
        self._raw = ""
