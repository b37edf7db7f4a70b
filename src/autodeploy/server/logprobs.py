"""Log-probabilities by token id go in, OpenAI's and vLLM's forms of them, with the tokens' texts, come out."""

from collections.abc import Mapping, Sequence

from autodeploy.runtime.request import Logprob
from autodeploy.runtime.tokenizer import Tokenizer
from autodeploy.server.answers import (
    ChatLogprobs,
    ChatTokenLogprob,
    CompletionLogprobs,
    PromptLogprob,
    PromptLogprobs,
    TokenLogprob,
)

LEAST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot say; OpenAI's own value for it."""

Entries = Sequence[Mapping[int, Logprob] | None]


class TokenNames:
    """Tokens as text, for log-probabilities.

    Args:
        as_ids: write `token_id:7` instead; also without a tokenizer.
    """

    def __init__(self, tokenizer: Tokenizer | None, *, as_ids: bool = False):
        self._tokenizer = None if as_ids else tokenizer

    def name(self, token_id: int) -> str:
        if self._tokenizer is None:
            return f"token_id:{token_id}"
        return self._tokenizer.decode([token_id], skip_special_tokens=False)

    def completion_logprobs(self, token_ids: Sequence[int], entries: Entries, offset: int) -> CompletionLogprobs:
        """OpenAI's older form. offset: characters of text before the first token."""
        tokens = [self.name(token_id) for token_id in token_ids]
        chosen = [
            None if entry is None else _finite(entry[token_id])
            for token_id, entry in zip(token_ids, entries, strict=True)
        ]
        top = [
            None
            if entry is None
            else {self.name(token_id): _finite(item) for token_id, item in _least_likely_first(entry)}
            for entry in entries
        ]
        offsets = []
        for token in tokens:
            offsets.append(offset)
            offset += len(token)
        return CompletionLogprobs(tokens=tokens, token_logprobs=chosen, top_logprobs=top, text_offset=offsets)

    def chat_logprobs(self, token_ids: Sequence[int], entries: Entries, top: int) -> ChatLogprobs:
        """OpenAI's newer form, with the `top` most likely tokens in each place."""
        content = []
        for token_id, entry in zip(token_ids, entries, strict=True):
            known = entry or {}
            likeliest = [
                self._token(other, item) for other, item in reversed(_least_likely_first(known)) if item.rank <= top
            ]
            own = self._token(token_id, known[token_id])
            content.append(ChatTokenLogprob(**own.model_dump(), top_logprobs=likeliest))
        return ChatLogprobs(content=content)

    def prompt_logprobs(self, entries: Entries | None) -> PromptLogprobs | None:
        """vLLM's form, for prompts."""
        if entries is None:
            return None
        return [None if entry is None else self._place(entry) for entry in entries]

    def _place(self, entry: Mapping[int, Logprob]) -> dict[str, PromptLogprob]:
        return {
            str(token_id): PromptLogprob(logprob=_finite(item), rank=item.rank, decoded_token=self.name(token_id))
            for token_id, item in entry.items()
        }

    def _token(self, token_id: int, item: Logprob) -> TokenLogprob:
        name = self.name(token_id)
        spelled = name.encode() if self._tokenizer is None else self._tokenizer.token_bytes(token_id)
        return TokenLogprob(token=name, logprob=_finite(item), bytes=list(spelled))


def _finite(item: Logprob) -> float:
    return max(item.logprob, LEAST_LOGPROB)


def _least_likely_first(entry: Mapping[int, Logprob]) -> list[tuple[int, Logprob]]:
    """In this order, the likelier of two tokens with the same text wins a place in a dict."""
    return sorted(entry.items(), key=lambda item: -item[1].rank)
