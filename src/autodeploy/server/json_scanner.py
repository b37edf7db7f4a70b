"""JSON that arrives character by character: where a value ends, and what a call's name and arguments are.

No recursion and no tree: a hostile output nests as deep as it likes.
"""

import json

MAX_NAME = 256
_SPACE = " \t\n\r"


class ValueScanner:
    """Finds the end of one JSON value. Takes malformed ones as they are; whoever reads them will see."""

    def __init__(self) -> None:
        self.is_done = False
        self._kind = ""
        self._depth = 0
        self._in_string = False
        self._is_escaped = False

    def take(self, character: str) -> bool:
        """Whether the character belongs to the value; a number ends before the character that follows it."""
        if not self._kind:
            self._kind = "container" if character in "{[" else "string" if character == '"' else "scalar"
        if self._kind == "scalar":
            self.is_done = character in ",]}" or character in _SPACE
            return not self.is_done
        if self._in_string:
            if self._is_escaped:
                self._is_escaped = False
            elif character == "\\":
                self._is_escaped = True
            elif character == '"':
                self._in_string = False
                self.is_done = self._depth == 0
        elif character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            self.is_done = self._depth == 0
        return True


class CallScanner:
    """Reads `{"name": ..., "arguments": {...}}` (or `parameters`), in any order and among other keys.

    Attributes:
        name: known from the moment its value has ended.
        is_done, is_bad: the object has ended; or it cannot be one.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.is_done = self.is_bad = False
        self._where = "object"
        self._key = ""
        self._value = ValueScanner()
        self._text: list[str] = []
        self._arguments: list[str] = []
        self._has_arguments = False

    def take(self, character: str) -> None:
        if self._where == "value":
            if not self._text and character in _SPACE:
                return
            if self._value.take(character):
                self._keep(character)
                if not self._value.is_done:
                    return
                self._end_value()
                return
            self._end_value()
        if self._where == "key name":
            self._value.take(character)
            self._text.append(character)
            if self._value.is_done:
                self._key, self._where = str(self._loaded()), "colon"
            elif len(self._text) > MAX_NAME:
                self.is_bad = True
        elif character not in _SPACE:
            self._between(character)

    def arguments(self) -> str:
        """What is new of the arguments. Nothing before the name is known."""
        if self.name is None:
            return ""
        if self.is_done and not self._has_arguments:
            self._has_arguments = True
            return "{}"
        fresh = "".join(self._arguments)
        self._arguments.clear()
        return fresh

    def _between(self, character: str) -> None:
        """Outside of keys and values."""
        expected = {"object": "{", "key": '"}', "colon": ":", "after value": ",}"}[self._where]
        if character not in expected:
            self.is_bad = True
        elif character == "}":
            self.is_done = True
        elif character == '"':
            self._where, self._value, self._text = "key name", ValueScanner(), [character]
            self._value.take(character)
        elif character == ":":
            self._where, self._value, self._text = "value", ValueScanner(), []
        else:
            self._where = "key"

    def _keep(self, character: str) -> None:
        is_arguments = self._key in ("arguments", "parameters") and not self._has_arguments
        if not self._text and is_arguments and character != '"':
            self._key = "streamed arguments"
        if self._key == "streamed arguments":
            self._arguments.append(character)
            self._text = [character]
            return
        if self._key == "name" and len(self._text) > MAX_NAME:
            self.is_bad = True
        if is_arguments or self._key == "name":
            self._text.append(character)
        else:
            self._text = [character]

    def _end_value(self) -> None:
        self._where = "after value"
        if self._key == "name" and self.name is None:
            name = self._loaded()
            self.is_bad |= not isinstance(name, str) or not name
            self.name = str(name)
        elif self._key == "streamed arguments":
            self._has_arguments = True
        elif self._key in ("arguments", "parameters") and not self._has_arguments:
            self._has_arguments = True  # arguments as a text that holds JSON
            self._arguments.append(str(self._loaded()))

    def _loaded(self) -> object:
        try:
            return json.loads("".join(self._text))
        except (ValueError, RecursionError):
            self.is_bad = True
            return None
