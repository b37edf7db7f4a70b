"""OpenAI's requests with vLLM's additions: JSON goes in, checked fields and `SamplingParams` come out."""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Field, Tag, model_validator

from autodeploy.errors import InvalidRequestError
from autodeploy.runtime.request import REAL_RANGES, WHOLE_RANGES, RequestOptions, SamplingParams
from autodeploy.server.fields import StrictModel
from autodeploy.server.output_requests import (
    MAX_CALLS,
    MAX_TOOLS,
    Guidance,
    NamedToolChoice,
    OutputFields,
    Tool,
    ToolChoice,
    arguments_schema,
    calls_schema,
)

MAX_MESSAGES = 4096

SAMPLING_FIELDS = (
    "n",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "stop",
    "stop_token_ids",
    "ignore_eos",
    "min_tokens",
    "allowed_token_ids",
    "bad_words",
    "prompt_logprobs",
    "skip_special_tokens",
    "include_stop_str_in_output",
)
"""Request fields that are `SamplingParams` fields of the same name."""


class StreamOptions(StrictModel):
    """What a stream carries besides text. `include_obfuscation` has no effect: chunks are never padded."""

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None
    include_obfuscation: bool | None = None


class CallerFields(StrictModel):
    """Fields about the caller, not about the answer: accepted whatever they say, and without effect."""

    user: Any = None
    metadata: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_options: Any = None
    prompt_cache_retention: Any = None


def _tell_ranges(schema: dict[str, Any]) -> None:
    """The ranges that `SamplingParams` checks, for the OpenAPI document."""
    for name, (least, most) in (REAL_RANGES | WHOLE_RANGES).items():
        if name in SAMPLING_FIELDS and name != "seed":
            number = schema["properties"][name]["anyOf"][0]
            number |= {"minimum": least} | ({} if most is None else {"maximum": most})
    schema["properties"]["seed"]["anyOf"][0]["format"] = "int64"  # its ends are no exact numbers in JSON
    top_p = schema["properties"]["top_p"]["anyOf"][0]
    top_p["exclusiveMinimum"] = top_p.pop("minimum")


# These tell the OpenAPI document what is checked where the values are used.
TokenId = Annotated[int, Field(json_schema_extra={"minimum": 0})]
Text = Annotated[str, Field(json_schema_extra={"minLength": 1})]
TokenIds = Annotated[list[TokenId], Field(json_schema_extra={"minItems": 1})]


class SamplingRequest(CallerFields, OutputFields):
    """The fields that completions and chat completions share."""

    model_config = ConfigDict(json_schema_extra=_tell_ranges)

    model: str | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[Text] | None = None
    stop_token_ids: list[TokenId] | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: TokenIds | None = None
    bad_words: list[Text] | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    truncate_prompt_tokens: int | None = Field(default=None, ge=1)
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    echo: bool | None = None
    priority: int | None = None
    cache_salt: str | None = Field(default=None, min_length=1, max_length=256)
    request_id: str | None = Field(default=None, min_length=1, max_length=128, pattern=r"^[A-Za-z0-9._:-]+$")

    @model_validator(mode="after")
    def _fields_fit_together(self) -> "SamplingRequest":
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError("stream_options is only allowed with stream=true", "stream_options")
        if self.prompt_logprobs is not None and self.stream:
            raise InvalidRequestError("prompt_logprobs is not given in a stream; leave out stream", "prompt_logprobs")
        return self

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def wants_usage_in_every_chunk(self) -> bool:
        return self.wants_usage and bool(self.stream_options and self.stream_options.continuous_usage_stats)

    def engine_options(self, timeout_seconds: float | None) -> RequestOptions:
        """How the engine serves it, beside what it samples."""
        return RequestOptions(priority=self.priority or 0, cache_salt=self.cache_salt, timeout_seconds=timeout_seconds)

    def _sampling_params(self, defaults: Mapping[str, Any], **own: Any) -> SamplingParams:
        given = {name: getattr(self, name) for name in SAMPLING_FIELDS if getattr(self, name) is not None}
        if self.logit_bias:
            given["logit_bias"] = {_token_id(key): bias for key, bias in self.logit_bias.items()}
        guidance = self.guidance()
        if guidance is not None:
            given["structured_outputs"] = guidance[1]
        return SamplingParams(**{**defaults, **given, **own})


def _token_id(key: str) -> int:
    if not (key.isascii() and key.isdigit() and len(key) < 16):
        raise InvalidRequestError(f"logit_bias has the key {key[:100]!r}; keys must be token ids", "logit_bias")
    return int(key)


class CompletionRequest(SamplingRequest):
    """Body of POST /v1/completions."""

    prompt: Text | Annotated[list[Text], Field(json_schema_extra={"minItems": 1})] | TokenIds | list[TokenIds]
    max_tokens: int | None = None
    logprobs: int | None = None
    add_special_tokens: bool = True

    @property
    def only_scores(self) -> bool:
        """No new token is wanted, only the prompt and its log-probabilities."""
        return bool(self.echo) and self.max_tokens == 0

    def sampling_params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """Raises InvalidRequestError for values outside their range."""
        max_tokens = 1 if self.only_scores else 16 if self.max_tokens is None else self.max_tokens
        own = {"max_tokens": max_tokens, "logprobs": self.logprobs}
        if self.echo and self.logprobs is not None and self.prompt_logprobs is None:
            own["prompt_logprobs"] = self.logprobs
        return self._sampling_params(defaults, **own)

    def prompts(self) -> list[str | list[int]]:
        """One entry per prompt."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [[token_id for token_id in self.prompt if isinstance(token_id, int)]]
        return [prompt for prompt in self.prompt if not isinstance(prompt, int)]


class ContentPart(StrictModel):
    """A part of a message. Text only: this server has no models that see or hear."""

    type: Literal["text"]
    text: str

    @model_validator(mode="before")
    @classmethod
    def _refuse_other_media(cls, values: Any) -> Any:
        if isinstance(values, dict) and values.get("type") != "text":
            kind = str(values.get("type"))[:100]
            raise InvalidRequestError(f"a content part of type {kind!r} is not supported; only 'text' is", "messages")
        return values


class CalledFunction(StrictModel):
    """A function that an earlier answer called. Arguments are JSON, as a text or as the object itself."""

    name: str = Field(max_length=256)
    arguments: str | dict[str, Any] | None = None


class MessageToolCall(StrictModel):
    """A call in an earlier answer."""

    id: str | None = None
    index: int | None = None
    type: Literal["function"] = "function"
    function: CalledFunction

    def as_template_input(self) -> dict[str, Any]:
        arguments: Any = self.function.arguments or {}
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments)
            except (ValueError, RecursionError) as error:
                raise InvalidRequestError("a tool call has arguments that are not valid JSON", "messages") from error
        call = {"type": "function", "function": {"name": self.function.name, "arguments": arguments}}
        return call if self.id is None else {"id": self.id, **call}


class ChatMessage(StrictModel):
    """One message of a conversation. The last four fields are allowed when empty, as answers carry them.

    A thought is `reasoning_content` or `reasoning`, as clients of different servers call it; answers carry both.
    """

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    tool_calls: list[MessageToolCall] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    refusal: None = None
    annotations: list[Any] | None = Field(default=None, max_length=0)
    audio: None = None
    function_call: None = None

    def as_template_input(self) -> dict[str, Any]:
        """The message as chat templates read it, text parts joined."""
        parts = self.content if isinstance(self.content, list) else []
        content = self.content if isinstance(self.content, str) else "\n".join(part.text for part in parts)
        thought = self.reasoning if self.reasoning_content is None else self.reasoning_content
        given = {"name": self.name, "tool_call_id": self.tool_call_id, "reasoning_content": thought}
        message: dict[str, Any] = {"role": self.role, "content": content}
        message |= {name: value for name, value in given.items() if value is not None}
        if self.tool_calls:
            message["tool_calls"] = [call.as_template_input() for call in self.tool_calls]
        return message


class ConversationFields(StrictModel):
    """A conversation, and how the model's chat template writes it. No template is taken from a request."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = Field(default=None, max_length=32)
    tools: list[Tool] | None = Field(default=None, max_length=MAX_TOOLS)

    @model_validator(mode="after")
    def _one_way_to_end(self) -> "ConversationFields":
        if self.continue_final_message and "add_generation_prompt" not in self.model_fields_set:
            self.add_generation_prompt = False
        if self.continue_final_message and self.add_generation_prompt:
            raise InvalidRequestError(
                "continue_final_message and add_generation_prompt exclude each other", "continue_final_message"
            )
        return self

    @property
    def must_call(self) -> bool:
        """The answer can be nothing but a call."""
        return False

    def template_tools(self) -> list[dict[str, Any]] | None:
        """The tools that the model is told of."""
        return [tool.model_dump(exclude_none=True) for tool in self.tools] if self.tools else None

    def template_arguments(self) -> dict[str, dict[str, Any]]:
        """What the request adds to the template's variables, by the field that asks for it."""
        effort = {} if self.reasoning_effort is None else {"reasoning_effort": self.reasoning_effort}
        return {"reasoning_effort": effort, "chat_template_kwargs": self.chat_template_kwargs or {}}


class ChatCompletionRequest(SamplingRequest, ConversationFields):
    """Body of POST /v1/chat/completions."""

    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    include_reasoning: bool | None = None

    @model_validator(mode="after")
    def _chat_fields_fit_together(self) -> "ChatCompletionRequest":
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequestError("top_logprobs is only allowed with logprobs=true", "top_logprobs")
        limits = {self.max_tokens, self.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise InvalidRequestError("max_tokens and max_completion_tokens differ; leave one out", "max_tokens")
        if self.echo:
            raise InvalidRequestError("echo is for completions; a conversation is not repeated", "echo")
        if self.tool_choice not in (None, "none", "auto") and not self.tools:
            raise InvalidRequestError("tool_choice asks for a call, but there are no tools", "tool_choice")
        return self

    @property
    def forced_tool(self) -> Tool | None:
        """The tool that must be called, if it is a certain one. Raises InvalidRequestError for an unknown one."""
        if not isinstance(self.tool_choice, NamedToolChoice):
            return None
        name = self.tool_choice.function.name
        found = [tool for tool in self.tools or () if tool.function.name == name]
        if not found:
            raise InvalidRequestError(f"tool_choice names {name[:100]!r}, which is none of the tools", "tool_choice")
        return found[0]

    @property
    def must_call(self) -> bool:
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedToolChoice)

    @property
    def may_call(self) -> bool:
        """The model is told of tools, and chooses by itself."""
        return bool(self.tools) and self.tool_choice in (None, "auto")

    def template_tools(self) -> list[dict[str, Any]] | None:
        return None if self.tool_choice == "none" else super().template_tools()

    def guidance(self) -> Guidance | None:
        asked = super().guidance()
        if not self.must_call:
            return asked
        if asked is not None:
            raise InvalidRequestError(f"tool_choice and {asked[0]} exclude each other", asked[0])
        if self.forced_tool is not None:
            return "tools", arguments_schema(self.forced_tool)
        return "tools", calls_schema(self.tools or [], 1 if self.parallel_tool_calls is False else MAX_CALLS)

    def sampling_params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """Without a limit of its own, an answer may fill the context. Raises InvalidRequestError for bad values."""
        limit = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        own: dict[str, Any] = {"max_tokens": limit, "logprobs": (self.top_logprobs or 0) if self.logprobs else None}
        names = {"logprobs": "top_logprobs"}  # what is asked for under another name than SamplingParams has
        if self.max_completion_tokens is not None:
            names["max_tokens"] = "max_completion_tokens"
        if self.may_call and self.skip_special_tokens is None:
            own["skip_special_tokens"] = False  # some models mark their calls with special tokens
        try:
            return self._sampling_params(defaults, **own)
        except InvalidRequestError as error:
            if error.parameter not in names:
                raise
            asked = names[error.parameter]
            raise InvalidRequestError(str(error).replace(error.parameter, asked, 1), asked) from error


class TokenizeTextRequest(StrictModel):
    """Body of POST /tokenize for a text."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool = False


class TokenizeChatRequest(ConversationFields):
    """Body of POST /tokenize for a conversation."""

    model: str | None = None
    return_token_strs: bool = False


def _tokenize_kind(body: Any) -> str:
    is_chat = isinstance(body, TokenizeChatRequest) or (isinstance(body, dict) and "messages" in body)
    return "TokenizeChatRequest" if is_chat else "TokenizeTextRequest"


TokenizeRequest = Annotated[
    Annotated[TokenizeTextRequest, Tag("TokenizeTextRequest")]
    | Annotated[TokenizeChatRequest, Tag("TokenizeChatRequest")],
    Discriminator(_tokenize_kind),
]
"""One of the two, told apart by `messages`, so that a fault is told of the right one."""


class DetokenizeRequest(StrictModel):
    """Body of POST /detokenize."""

    model: str | None = None
    tokens: list[TokenId]
