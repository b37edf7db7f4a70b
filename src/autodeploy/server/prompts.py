"""Prompts of requests: texts, token ids and conversations go in, token ids come out."""

import asyncio
from functools import partial
from typing import Any

from autodeploy.errors import InvalidRequestError
from autodeploy.server.requests import CompletionRequest, ConversationFields
from autodeploy.server.served import ServedModel
from autodeploy.server.time_limit import OutOfTimeError, run_within

TEMPLATE_SECONDS = 10.0


class PromptReader:
    """Tokenises in threads: a long text must not hold up everybody else's streams."""

    def __init__(self, served: ServedModel):
        self._served = served

    async def encode(self, prompt: str | list[int], body: CompletionRequest) -> list[int]:
        """Raises InvalidRequestError for a prompt that is empty, too long, or a text where there is no tokenizer."""
        if not prompt:
            raise InvalidRequestError("the prompt is empty; give at least one character or token", "prompt")
        token_ids = prompt if isinstance(prompt, list) else await self.encode_text(prompt, body.add_special_tokens)
        return token_ids[-body.truncate_prompt_tokens :] if body.truncate_prompt_tokens else token_ids

    async def encode_text(self, text: str, add_special_tokens: bool) -> list[int]:
        tokenizer = self._served.require_tokenizer("prompt")
        self._check_length(text, "prompt")
        return await asyncio.to_thread(partial(tokenizer.encode, text, add_special_tokens=add_special_tokens))

    async def encode_chat(self, body: ConversationFields, *, truncate: int | None = None) -> list[int]:
        """Raises InvalidRequestError for messages that the chat template refuses, or where there is none."""
        tokenizer = self._served.require_tokenizer("messages")
        tools = body.template_tools()
        if tools and "tools" not in self._served.chat_template:
            if not body.must_call:
                raise InvalidRequestError("the chat template of this model takes no tools", "tools")
            tools = None  # the answer is a call all the same: its schema is followed, whatever the model was told
        arguments: dict[str, Any] = {}
        for field, given in body.template_arguments().items():
            tokenizer.check_template_arguments(given, field)
            arguments |= given
        messages = [message.as_template_input() for message in body.messages]
        self._check_length("".join(str(message["content"]) for message in messages), "messages")
        render = partial(
            tokenizer.apply_chat_template,
            messages,
            add_generation_prompt=body.add_generation_prompt,
            continue_final_message=body.continue_final_message,
            tools=tools,
            template_arguments=arguments,
            trust_messages=False,
        )
        try:
            token_ids = await asyncio.to_thread(run_within, TEMPLATE_SECONDS, render)
        except OutOfTimeError as error:
            raise InvalidRequestError(
                f"the chat template is too slow for these messages: {error}", "messages"
            ) from error
        return token_ids[-truncate:] if truncate else token_ids

    def text(self, prompt: str | list[int], token_ids: list[int]) -> str:
        """What a completion that repeats its prompt begins with."""
        if isinstance(prompt, str):
            return prompt
        return "" if self._served.tokenizer is None else self._served.tokenizer.decode(token_ids)

    def _check_length(self, text: str, parameter: str) -> None:
        """Refuses at once what would be refused after it has been tokenised: a token has so many characters at most."""
        tokenizer, limit = self._served.tokenizer, self._served.max_model_len
        if tokenizer is not None and limit is not None and len(text) > limit * tokenizer.longest_token:
            raise InvalidRequestError(
                f"the prompt is too long: {len(text)} characters are more than {limit} tokens can hold", parameter
            )
