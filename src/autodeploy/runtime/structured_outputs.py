"""What an output must look like: a JSON schema, a regular expression, a list of choices or a grammar, as plain data."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from autodeploy.errors import InvalidRequestError

Kind = Literal["json", "regex", "choice", "grammar"]

MAX_BYTES = 128 * 1024
MAX_REGEX_BYTES = 16 * 1024
MAX_CHOICES = 4096
MAX_NESTING = 100
MAX_DEFINITIONS = 1024
"""Rules of a grammar, or references of a schema. Chains of them are followed by recursion when they are compiled."""

PARAMETER = "structured_outputs"


@dataclass(frozen=True, kw_only=True)
class StructuredOutputsParams:
    """Exactly one form that the output must have; checked on construction, compiled later.

    Attributes:
        json: a JSON schema, as text or as the parsed object. Kept as text.
        json_object: any JSON object.
        regex: a regular expression for the whole output, in the syntax of Rust's `regex` crate.
        choice: texts, one of which is the output. Kept as a tuple.
        grammar: a context-free grammar in Lark's notation or GBNF.
        compiled: what a compiler keeps here, so that the engine does not compile again.
    Raises:
        InvalidRequestError: none or several are given, or one is too large to be compiled safely.
    """

    json: str | Mapping[str, Any] | bool | None = None
    json_object: bool = False
    regex: str | None = None
    choice: Sequence[str] | None = None
    grammar: str | None = None
    compiled: Any = field(default=None, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        given = [name for name in ("json", "regex", "choice", "grammar") if getattr(self, name) is not None]
        given += ["json_object"] * bool(self.json_object)
        if len(given) != 1:
            raise _invalid(f"needs exactly one of json, json_object, regex, choice and grammar; got {given or 'none'}")
        if self.json is not None:
            object.__setattr__(self, "json", _checked_schema(self.json))
        if self.choice is not None:
            object.__setattr__(self, "choice", _checked_choices(self.choice))
        for name, most in (("regex", MAX_REGEX_BYTES), ("grammar", MAX_BYTES)):
            if getattr(self, name) is not None:
                _check_text(name, getattr(self, name), most)
        if self.grammar is not None and self.grammar.count("\n") + self.grammar.count(":") > MAX_DEFINITIONS:
            raise _invalid(f"has a grammar of more than {MAX_DEFINITIONS} lines or rules")

    @property
    def source(self) -> tuple[Kind, str]:
        """The kind and one text that says it all: what is compiled, and what it is kept under."""
        if self.json_object:
            return "json", '{"type": "object"}'
        if self.json is not None:
            return "json", str(self.json)
        if self.regex is not None:
            return "regex", self.regex
        if self.choice is not None:
            return "choice", json.dumps(list(self.choice))
        return "grammar", self.grammar or ""


def _checked_schema(given: object) -> str:
    schema = given
    if isinstance(given, str):
        _check_text("json", given, MAX_BYTES)
        try:
            schema = json.loads(given)
        except (ValueError, RecursionError) as error:
            raise _invalid(f"has a schema that is not valid JSON: {error}") from error
    if not isinstance(schema, Mapping | bool):
        raise _invalid(f"has a schema of type {type(schema).__name__}; it must be a JSON object")
    try:
        text = json.dumps(schema, allow_nan=False)
    except (ValueError, TypeError, RecursionError) as error:
        raise _invalid(f"has a schema that is not valid JSON: {error}") from error
    _check_text("json", text, MAX_BYTES)
    if text.count('"$ref"') > MAX_DEFINITIONS:
        raise _invalid(f"has a schema of more than {MAX_DEFINITIONS} references")
    return text


def _checked_choices(given: object) -> tuple[str, ...]:
    if not isinstance(given, Sequence) or isinstance(given, str) or not all(isinstance(text, str) for text in given):
        raise _invalid("has a choice that is not a list of strings")
    if not 0 < len(given) <= MAX_CHOICES or not all(given):
        raise _invalid(f"has {len(given)} choices; there must be 1 to {MAX_CHOICES}, none of them empty")
    _check_text("choice", "".join(given), MAX_BYTES, counts_brackets=False)
    return tuple(dict.fromkeys(given))


def _check_text(name: str, text: object, most: int, *, counts_brackets: bool = True) -> None:
    if not isinstance(text, str) or not text:
        raise _invalid(f"has a {name} that is not a text")
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise _invalid(f"has a {name} that is not valid Unicode at character {error.start}") from error
    if size > most:
        raise _invalid(f"has a {name} of {size} bytes; at most {most} are allowed")
    depth = deepest = 0
    for character in text if counts_brackets else "":
        if character in "([{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in ")]}":
            depth = max(0, depth - 1)
    if deepest > MAX_NESTING:
        raise _invalid(f"has a {name} that nests {deepest} deep; at most {MAX_NESTING} is allowed")


def _invalid(what: str) -> InvalidRequestError:
    return InvalidRequestError(f"{PARAMETER} {what}", PARAMETER)
