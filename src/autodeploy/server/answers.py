"""OpenAI's answers as typed models, with vLLM's additions: what a client reads of a success or a failure."""

import time
from typing import Any, Literal

from pydantic import BaseModel, Field


def _is_none(value: object) -> bool:
    return value is None


def asked_for() -> Any:
    """A field that only some requests ask for: left out where it is None."""
    return Field(default=None, exclude_if=_is_none)


class PromptTokensDetails(BaseModel):
    """Where the states of a prompt's tokens came from."""

    cached_tokens: int


class Usage(BaseModel):
    """Tokens of a request: all prompts, all choices."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails | None = asked_for()


class CompletionLogprobs(BaseModel):
    """Log-probabilities of a completion, one entry per token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class PromptLogprob(BaseModel):
    """A token in one place of the prompt, in vLLM's form."""

    logprob: float
    rank: int
    decoded_token: str


PromptLogprobs = list[dict[str, PromptLogprob] | None]
"""Per token of a prompt, None for the first: token ids and what the model thought of them."""


class CompletionChoice(BaseModel):
    """One answer, or the next piece of one."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    prompt_logprobs: PromptLogprobs | None = asked_for()
    token_ids: list[int] | None = asked_for()
    prompt_token_ids: list[int] | None = asked_for()


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


class FunctionCall(BaseModel):
    """What is called. `arguments` is JSON as the model wrote it; nothing has checked it against a schema."""

    name: str
    arguments: str


class ToolCall(BaseModel):
    """A call of a tool."""

    id: str
    type: Literal["function"] = "function"
    function: FunctionCall


class FunctionCallDelta(BaseModel):
    """The next piece of a call; the first one carries the name."""

    name: str | None = asked_for()
    arguments: str


class ToolCallDelta(BaseModel):
    """The next piece of a call; the first one carries its id."""

    index: int
    id: str | None = asked_for()
    type: Literal["function"] | None = asked_for()
    function: FunctionCallDelta


class AnswerMessage(BaseModel):
    """The answer in a chat. A thought has two names, since clients of different servers look for one or the other."""

    role: Literal["assistant"] = "assistant"
    content: str | None
    reasoning_content: str | None = asked_for()
    reasoning: str | None = asked_for()
    tool_calls: list[ToolCall] | None = asked_for()


class AnswerDelta(BaseModel):
    """The next piece of an answer; the first one carries the role."""

    role: Literal["assistant"] | None = asked_for()
    content: str | None = asked_for()
    reasoning_content: str | None = asked_for()
    reasoning: str | None = asked_for()
    tool_calls: list[ToolCallDelta] | None = asked_for()


class ChatChoice(BaseModel):
    """One answer."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = asked_for()


class ChatChunkChoice(BaseModel):
    """The next piece of one answer."""

    index: int
    delta: AnswerDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | None = asked_for()


class ChatCompletionResponse(BaseModel):
    """Answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int = Field(default_factory=lambda: int(time.time()))
    model: str
    choices: list[ChatChoice]
    usage: Usage
    prompt_logprobs: PromptLogprobs | None = asked_for()
    prompt_token_ids: list[int] | None = asked_for()


class ChatCompletionChunk(BaseModel):
    """One chunk of a streamed chat answer."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int = Field(default_factory=lambda: int(time.time()))
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    prompt_token_ids: list[int] | None = asked_for()


class ErrorDetail(BaseModel):
    """What went wrong. `param` names the field at fault."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """Body of every answer that is not a success."""

    error: ErrorDetail


class ModelCard(BaseModel):
    """A name that requests may ask for."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "autodeploy"
    root: str
    max_model_len: int | None


class ModelList(BaseModel):
    """Answer of GET /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class VersionResponse(BaseModel):
    """Answer of GET /version."""

    version: str


class TokenizeResponse(BaseModel):
    """Answer of POST /tokenize."""

    count: int
    max_model_len: int | None
    tokens: list[int]
    token_strs: list[str] | None = asked_for()


class DetokenizeResponse(BaseModel):
    """Answer of POST /detokenize."""

    prompt: str
