"""What a request says of the form of its output: JSON schemas, grammars, tools. Checked fields go in, one
`StructuredOutputsParams` comes out, with the name of the field that asked for it.
"""

from typing import Any, Literal

from pydantic import Field

from autodeploy.errors import InvalidRequestError
from autodeploy.runtime.structured_outputs import StructuredOutputsParams
from autodeploy.server.fields import StrictModel

MAX_TOOLS = 128
MAX_CALLS = 32
NAME_PATTERN = r"^[A-Za-z0-9_.-]{1,64}$"
GUIDED_FIELDS = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")

Guidance = tuple[str, StructuredOutputsParams]
"""A field's name and what it asks for."""


class JsonSchemaFormat(StrictModel):
    """The schema of `response_format`. It is followed to the letter, whatever `strict` says."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | bool = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(StrictModel):
    """OpenAI's way to ask for JSON."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None

    def guidance(self) -> StructuredOutputsParams | None:
        if (self.json_schema is None) == (self.type == "json_schema"):
            raise InvalidRequestError("json_schema and type='json_schema' belong together", "response_format")
        if self.json_schema is not None:
            return StructuredOutputsParams(json=self.json_schema.schema_)
        return StructuredOutputsParams(json_object=True) if self.type == "json_object" else None


class StructuredOutputs(StrictModel):
    """vLLM's way to ask for structured output: exactly one of these."""

    json_: dict[str, Any] | str | bool | None = Field(default=None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None

    def guidance(self) -> StructuredOutputsParams:
        return StructuredOutputsParams(
            json=self.json_,
            json_object=bool(self.json_object),
            regex=self.regex,
            choice=self.choice,
            grammar=self.grammar,
        )


class OutputFields(StrictModel):
    """Fields that ask for an output of a certain form."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | bool | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    def guidance(self) -> Guidance | None:
        """Raises InvalidRequestError for two forms at once, or for one that is too large."""
        given: list[Guidance] = []
        for name in ("response_format", "structured_outputs", *GUIDED_FIELDS):
            value = getattr(self, name)
            if value is None:
                continue
            kind = name.removeprefix("guided_")
            try:
                asked = StructuredOutputsParams(**{kind: value}) if kind != name else value.guidance()
            except InvalidRequestError as error:
                raise InvalidRequestError(str(error), name) from error
            given += [(name, asked)] if asked is not None else []
        if len(given) > 1:
            raise InvalidRequestError(f"{given[0][0]} and {given[1][0]} exclude each other", given[1][0])
        return given[0] if given else None


class ToolFunction(StrictModel):
    """A function that the model may call."""

    name: str = Field(pattern=NAME_PATTERN)
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(StrictModel):
    """A tool; functions are the only ones."""

    type: Literal["function"]
    function: ToolFunction


class NamedFunction(StrictModel):
    """The name of a function to call."""

    name: str


class NamedToolChoice(StrictModel):
    """One certain function must be called."""

    type: Literal["function"]
    function: NamedFunction


ToolChoice = Literal["none", "auto", "required"] | NamedToolChoice


def calls_schema(tools: list[Tool], most: int) -> StructuredOutputsParams:
    """A list of one to `most` calls: `[{"name": ..., "arguments": ...}]`."""
    definitions: dict[str, Any] = {}
    calls = []
    for position, tool in enumerate(tools):
        parameters = _with_own_definitions(tool.function.parameters or {"type": "object"}, f"t{position}", definitions)
        calls.append(
            {
                "type": "object",
                "properties": {"name": {"const": tool.function.name}, "arguments": parameters},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    schema = {"type": "array", "items": {"anyOf": calls}, "minItems": 1, "maxItems": most}
    return _about_tools({**schema, "$defs": definitions} if definitions else schema)


def arguments_schema(tool: Tool) -> StructuredOutputsParams:
    return _about_tools(tool.function.parameters or {"type": "object"})


def _about_tools(schema: dict[str, Any]) -> StructuredOutputsParams:
    try:
        return StructuredOutputsParams(json=schema)
    except InvalidRequestError as error:
        raise InvalidRequestError(str(error), "tools") from error


def _with_own_definitions(schema: dict[str, Any], prefix: str, definitions: dict[str, Any]) -> dict[str, Any]:
    """The schema as a part of another one: its definitions move to the other's, under names of their own."""
    own = {key: schema[key] for key in ("$defs", "definitions") if isinstance(schema.get(key), dict)}
    if not own:
        return schema
    places = {f"#/{key}/{name}": f"#/$defs/{prefix}.{at}.{name}" for at, key in enumerate(own) for name in own[key]}

    def moved(value: Any) -> Any:
        if isinstance(value, list):
            return [moved(entry) for entry in value]
        if isinstance(value, dict):
            return {
                key: places.get(entry, entry) if key == "$ref" and isinstance(entry, str) else moved(entry)
                for key, entry in value.items()
            }
        return value

    try:
        for at, key in enumerate(own):
            definitions.update({f"{prefix}.{at}.{name}": moved(entry) for name, entry in own[key].items()})
        result: dict[str, Any] = moved({key: value for key, value in schema.items() if key not in own})
    except RecursionError as error:
        raise InvalidRequestError("a tool's parameters nest too deep", "tools") from error
    return result
