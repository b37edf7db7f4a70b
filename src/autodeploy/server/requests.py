"""OpenAI's requests with vLLM's additions: JSON goes in, checked fields and `SamplingParams` come out."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field, model_validator

from autodeploy.errors import InvalidRequestError
from autodeploy.runtime.request import SamplingParams
from autodeploy.server.fields import StrictModel

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
    prompt_cache_retention: Any = None


class SamplingRequest(CallerFields):
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
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    truncate_prompt_tokens: int | None = Field(default=None, ge=1)
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    echo: bool | None = None
    priority: int | None = None
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

    def _sampling_params(self, defaults: Mapping[str, Any], **own: Any) -> SamplingParams:
        given = {name: getattr(self, name) for name in SAMPLING_FIELDS if getattr(self, name) is not None}
        if self.logit_bias:
            given["logit_bias"] = {_token_id(key): bias for key, bias in self.logit_bias.items()}
        return SamplingParams(**{**defaults, **given, **own})


def _token_id(key: str) -> int:
    if not (key.isascii() and key.isdigit() and len(key) < 16):
        raise InvalidRequestError(f"logit_bias has the key {key[:100]!r}; keys must be token ids", "logit_bias")
    return int(key)


class CompletionRequest(SamplingRequest):
    """Body of POST /v1/completions."""

    prompt: str | list[str] | list[int] | list[list[int]]
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

    def as_template_input(self) -> dict[str, Any]:
        """The message as chat templates read it, text parts joined."""
        parts = self.content if isinstance(self.content, list) else []
        content = self.content if isinstance(self.content, str) else "\n".join(part.text for part in parts)
        return {"role": self.role, "content": content} | ({} if self.name is None else {"name": self.name})


class ConversationFields(StrictModel):
    """A conversation, and how the model's chat template writes it. No template is taken from a request."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = Field(default=None, max_length=32)

    @model_validator(mode="after")
    def _one_way_to_end(self) -> "ConversationFields":
        if self.continue_final_message and "add_generation_prompt" not in self.model_fields_set:
            self.add_generation_prompt = False
        if self.continue_final_message and self.add_generation_prompt:
            raise InvalidRequestError(
                "continue_final_message and add_generation_prompt exclude each other", "continue_final_message"
            )
        return self

    def template_arguments(self) -> dict[str, Any]:
        """What the request adds to the template's variables."""
        effort = {} if self.reasoning_effort is None else {"reasoning_effort": self.reasoning_effort}
        return effort | (self.chat_template_kwargs or {})


class ChatCompletionRequest(SamplingRequest, ConversationFields):
    """Body of POST /v1/chat/completions."""

    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> "ChatCompletionRequest":
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequestError("top_logprobs is only allowed with logprobs=true", "top_logprobs")
        if self.echo:
            raise InvalidRequestError("echo is for completions; a conversation is not repeated", "echo")
        return self

    def sampling_params(self, defaults: Mapping[str, Any]) -> SamplingParams:
        """Without a limit of its own, an answer may fill the context. Raises InvalidRequestError for bad values."""
        limit = self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens
        return self._sampling_params(
            defaults, max_tokens=limit, logprobs=(self.top_logprobs or 0) if self.logprobs else None
        )


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


class DetokenizeRequest(StrictModel):
    """Body of POST /detokenize."""

    model: str | None = None
    tokens: list[int]
