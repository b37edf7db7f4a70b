"""Calls of tools written as nested elements, each value as plain text between its own tags:

<tool_call>
<function=f>
<parameter=city>
Paris
</parameter>
</function>
</tool_call>

The arguments come out as JSON, one parameter after the other; the tool's schema says which values are not texts.
"""

import json
from collections.abc import Mapping
from typing import Any

from autodeploy.server.answer_parts import CallArguments, CallReader, CallStart, Part, split_at_marker
from autodeploy.server.json_scanner import MAX_NAME

FUNCTION, PARAMETER = "<function=", "<parameter="
_quoted = json.JSONEncoder(ensure_ascii=False).encode
_CALL, _CALL_END, _FUNCTION_END, _PARAMETER_END = "<tool_call>", "</tool_call>", "</function>", "</parameter>"


class ElementCallReader(CallReader):
    """Reads calls whose arguments are elements.

    Args:
        parameters: JSON schemas of the arguments, by tool.
    """

    def __init__(self, parameters: Mapping[str, Mapping[str, Any]]):
        super().__init__()
        self._parameters = parameters
        self._where = "text"
        self._name = ""
        self._parameter = ""
        self._value: list[str] = []
        self._is_empty = True

    def finish(self) -> list[Part]:
        parts: list[Part] = []
        if self._where in ("text", "call", "name"):
            self._last_text(self._raw + self._held, parts)
        self._held = ""
        return parts

    def _advance(self, parts: list[Part]) -> bool:
        return {
            "text": self._read_text,
            "call": self._read_call,
            "name": self._read_name,
            "function": self._read_function,
            "parameter": self._read_parameter,
            "value": self._read_value,
        }[self._where](parts)

    def _read_text(self, parts: list[Part]) -> bool:
        ends = (_CALL_END,) if self.num_calls else ()
        before, marker, self._held = split_at_marker(self._held, (_CALL, FUNCTION, *ends))
        self._text(before, parts)
        if marker in (_CALL, FUNCTION):
            self._raw, self._space = self._space + marker, ""
            self._where = "call" if marker == _CALL else "name"
        return marker is not None

    def _read_call(self, parts: list[Part]) -> bool:
        """Nothing but white space stands before the function."""
        begun = self._held.lstrip()
        if begun.startswith(FUNCTION):
            self._raw += self._held[: len(self._held) - len(begun)] + FUNCTION
            self._held, self._where = begun.removeprefix(FUNCTION), "name"
            return True
        if FUNCTION.startswith(begun) and len(self._held) <= MAX_NAME:
            return False
        return self._give_up(parts)

    def _read_name(self, parts: list[Part]) -> bool:
        name, end, rest = self._held.partition(">")
        if not end and len(name) <= MAX_NAME:
            return False
        if not end or not name.strip() or len(name) > MAX_NAME:
            return self._give_up(parts)
        self._name, self._raw, self._is_empty = name.strip(), "", True
        parts.append(CallStart(self.num_calls, self._name))
        self.num_calls += 1
        self._arguments("{", parts)
        self._held, self._where = rest, "function"
        return True

    def _read_function(self, parts: list[Part]) -> bool:
        _, marker, self._held = split_at_marker(self._held, (PARAMETER, _FUNCTION_END, _CALL_END))
        if marker == PARAMETER:
            self._where = "parameter"
        elif marker is not None:
            self._arguments("}", parts)
            self._where = "text"
        return marker is not None

    def _read_parameter(self, parts: list[Part]) -> bool:
        name, end, rest = self._held.partition(">")
        if not end and len(name) <= MAX_NAME:
            return False
        self._parameter, self._held = name.strip()[:MAX_NAME], rest
        self._value, self._where = [], "value"
        return True

    def _read_value(self, parts: list[Part]) -> bool:
        more, marker, self._held = split_at_marker(self._held, (_PARAMETER_END,))
        self._value.append(more)
        if marker is None:
            return False
        value = "".join(self._value).removeprefix("\n").removesuffix("\n")
        properties = self._parameters.get(self._name, {}).get("properties")
        schema = properties.get(self._parameter) if isinstance(properties, dict) else None
        comma = "" if self._is_empty else ", "
        self._arguments(f"{comma}{_quoted(self._parameter)}: {_as_json(value, _types(schema))}", parts)
        self._is_empty, self._where = False, "function"
        return True

    def _arguments(self, text: str, parts: list[Part]) -> None:
        parts.append(CallArguments(self.num_calls - 1, text))

    def _give_up(self, parts: list[Part]) -> bool:
        """It was no call."""
        self._text(self._raw, parts)
        self._raw, self._where = "", "text"
        return True


def _types(schema: Any) -> set[str]:
    """The types that a schema names; of alternatives, those of each."""
    if not isinstance(schema, dict):
        return set()
    branches = [schema]
    for keyword in ("anyOf", "oneOf"):
        given = schema.get(keyword)
        branches += [branch for branch in given if isinstance(branch, dict)] if isinstance(given, list) else []
    named = [branch.get("type") for branch in branches]
    return {
        kind for kinds in named for kind in (kinds if isinstance(kinds, list) else [kinds]) if isinstance(kind, str)
    }


def _as_json(value: str, types: set[str]) -> str:
    """What is JSON already stays as it is, where the schema wants no text; else a JSON string."""
    spelled = value.strip()
    if "null" in types and spelled == "null":
        return spelled
    if "string" in types or not (types or spelled.startswith(("{", "["))):
        return _quoted(value)
    if "boolean" in types and spelled.lower() in ("true", "false"):
        return spelled.lower()
    try:
        json.loads(spelled, parse_constant=_refuse)
    except (ValueError, RecursionError):
        return _quoted(value)
    return spelled


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is no JSON")
