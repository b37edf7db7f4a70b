"""OpenAI's requests and answers as typed models: JSON goes in, checked fields and `SamplingParams` come out.

Nothing is ignored silently: a field that would change the answer and is not supported is refused by name.
"""

import difflib
import time
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_serializer, model_validator

from autodeploy.errors import InvalidRequestError
from autodeploy.runtime.request import SamplingParams

HARMLESS_FIELDS = frozenset({"user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_retention"})
"""Fields about the caller, not about the answer: accepted whatever they say."""

UNSUPPORTED_FIELDS: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": (),
    "audio": (),
    "bad_words": (),
    "best_of": (1,),
    "cache_salt": (),
    "chat_template": (),
    "chat_template_kwargs": (),
    "documents": (),
    "echo": (),
    "function_call": ("none",),
    "functions": (),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "include_reasoning": (),
    "kv_transfer_params": (),
    "length_penalty": (1.0,),
    "logit_bias": (),
    "logits_processors": (),
    "mm_processor_kwargs": (),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True,),
    "prediction": (),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "reasoning_effort": (),
    "response_format": ({"type": "text"},),
    "return_token_ids": (),
    "return_tokens_as_token_ids": (),
    "service_tier": ("auto", "default"),
    "spaces_between_special_tokens": (True,),
    "store": (),
    "structured_outputs": (),
    "suffix": (),
    "tool_choice": ("none", "auto"),
    "tools": (),
    "truncate_prompt_tokens": (),
    "use_beam_search": (),
    "verbosity": (),
    "web_search_options": (),
}
"""Fields of OpenAI's and vLLM's APIs that are not supported, and values that ask for nothing beside null and empty."""

_EMPTY: tuple[Any, ...] = (None, False, "", [], {})

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
    "skip_special_tokens",
    "include_stop_str_in_output",
)
"""Request fields that are `SamplingParams` fields of the same name."""


class StrictModel(BaseModel):
    """A part of a request: no unknown fields, no silent conversion of types."""

    model_config = ConfigDict(extra="forbid", strict=True)

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_is_not_done(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        kept = {}
        for name, value in values.items():
            if name in cls.model_fields:
                kept[name] = value
            elif name not in HARMLESS_FIELDS and not _asks_for_nothing(name, value):
                raise _refusal(name, sorted(cls.model_fields))
        return kept


def _asks_for_nothing(name: str, value: Any) -> bool:
    neutral = UNSUPPORTED_FIELDS.get(name)
    # Equality alone would take 0 for False and 1 for True.
    return neutral is not None and any(
        value == known and isinstance(value, bool) == isinstance(known, bool) for known in (*neutral, *_EMPTY)
    )


def _refusal(name: str, known: list[str]) -> InvalidRequestError:
    if name in UNSUPPORTED_FIELDS:
        return InvalidRequestError(f"the field {name!r} is not supported with this value; leave it out", name)
    nearest = difflib.get_close_matches(name[:100], known, n=1)
    hint = f"did you mean {nearest[0]!r}?" if nearest else f"known fields: {', '.join(known)}"
    return InvalidRequestError(f"unknown field {name[:100]!r}; {hint}", name[:100])


class StreamOptions(StrictModel):
    """What a stream carries besides text. `include_obfuscation` has no effect: chunks are never padded."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


class SamplingRequest(StrictModel):
    """The fields that completions and chat completions share."""

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
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    priority: int | None = None

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> "SamplingRequest":
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError("stream_options is only allowed with stream=true", "stream_options")
        return self

    @property
    def wants_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    def _sampling_params(
        self, defaults: Mapping[str, Any], max_tokens: int | None, logprobs: int | None
    ) -> SamplingParams:
        given = {name: getattr(self, name) for name in SAMPLING_FIELDS if getattr(self, name) is not None}
        return SamplingParams(**{**defaults, **given, "max_tokens": max_tokens, "logprobs": logprobs})


class CompletionRequest(SamplingRequest):
    """Body of POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
    max_tokens: int | None = None
    logprobs: int | None = None

    def sampling_params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """Raises InvalidRequestError for values outside their range."""
        return self._sampling_params(defaults, 16 if self.max_tokens is None else self.max_tokens, self.logprobs)

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


class ChatMessage(StrictModel):
    """One message of a conversation. The last five fields are allowed when empty, as answers carry them."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None
    name: str | None = None
    refusal: None = None
    annotations: list[Any] | None = Field(default=None, max_length=0)
    audio: None = None
    function_call: None = None
    tool_calls: list[Any] | None = Field(default=None, max_length=0)

    def as_template_input(self) -> dict[str, str]:
        """The message as chat templates read it, text parts joined."""
        parts = self.content if isinstance(self.content, list) else []
        content = self.content if isinstance(self.content, str) else "\n".join(part.text for part in parts)
        return {"role": self.role, "content": content} | ({} if self.name is None else {"name": self.name})


class ChatCompletionRequest(SamplingRequest):
    """Body of POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> "ChatCompletionRequest":
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequestError("top_logprobs is only allowed with logprobs=true", "top_logprobs")
        if self.continue_final_message and "add_generation_prompt" not in self.model_fields_set:
            self.add_generation_prompt = False
        if self.continue_final_message and self.add_generation_prompt:
            raise InvalidRequestError(
                "continue_final_message and add_generation_prompt exclude each other", "continue_final_message"
            )
        return self

    def sampling_params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """Without a limit of its own, an answer may fill the context. Raises InvalidRequestError for bad values."""
        limit = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        return self._sampling_params(defaults, limit, (self.top_logprobs or 0) if self.logprobs else None)


class Usage(BaseModel):
    """Tokens of a request: all prompts, all choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class CompletionLogprobs(BaseModel):
    """Log-probabilities of a completion, one entry per token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """One answer, or the next piece of one."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class CompletionResponse(BaseModel):
    """Answer of /v1/completions, whole or one chunk of a stream."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int = Field(default_factory=lambda: int(time.time()))
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TokenLogprob(BaseModel):
    """A token's text, its UTF-8 bytes and its log-probability."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprob(TokenLogprob):
    """A generated token with the most likely ones in its place."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    """Log-probabilities of a chat answer, one entry per token."""

    content: list[ChatTokenLogprob]


class AnswerMessage(BaseModel):
    """The answer in a chat."""

    role: Literal["assistant"] = "assistant"
    content: str


class AnswerDelta(BaseModel):
    """The next piece of an answer; the first one carries the role."""

    role: Literal["assistant"] | None = None
    content: str | None = None

    @model_serializer
    def _only_what_is_there(self) -> dict[str, str]:
        return {name: value for name, value in (("role", self.role), ("content", self.content)) if value is not None}


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class ChatChunkChoice(BaseModel):
    """The next piece of one answer."""

    index: int
    delta: AnswerDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None


class ChatCompletionResponse(BaseModel):
    """Answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int = Field(default_factory=lambda: int(time.time()))
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChatCompletionChunk(BaseModel):
    """One chunk of a streamed chat answer."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int = Field(default_factory=lambda: int(time.time()))
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class ErrorDetail(BaseModel):
    """What went wrong. `param` names the field at fault."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """Body of every answer that is not a success."""

    error: ErrorDetail
