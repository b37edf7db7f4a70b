"""Text in, token ids out, and back: a Hugging Face tokenizer, text that grows token by token, and stop strings."""

import inspect
import json
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from autodeploy.errors import CheckpointError, InvalidRequestError
from autodeploy.runtime.request import SamplingParams

if TYPE_CHECKING:  # importing transformers takes longer than a start without it
    from transformers import PreTrainedConfig, PreTrainedTokenizerBase

REPLACEMENT = "\ufffd"
"""What a decoder writes for bytes that are not (yet) a character."""

CONTEXT_TOKENS = 4
"""Tokens kept in front of new ones, so that a decoder sees where they stand (spaces, half characters)."""

WINDOW_TOKENS = 16
"""Length at which the window is cut back to its context."""

UNDECIDED_TOKENS = 4
"""A character has at most four bytes, so at most this many tokens at the end can still become another text."""


def _plain_config(folder: Path) -> "PreTrainedConfig | None":
    """The model's config without its class, where the tokenizer's own config names the tokenizer's class; else None.

    transformers then looks at the config's values only, and importing the class of a config takes a second: it pulls in
    all that models need.
    """
    try:
        stored = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        named = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not named.get("tokenizer_class") or "auto_map" in named or "auto_map" in stored or "model_type" not in stored:
        return None
    from transformers import PreTrainedConfig

    config = PreTrainedConfig()
    values = {"model_type": stored["model_type"], "tokenizer_class": stored.get("tokenizer_class")}
    vars(config).update(values, _name_or_path=str(folder))
    return config


RESERVED_TEMPLATE_NAMES = frozenset({"messages", "tools", "documents", "raise_exception", "strftime_now", "tojson"})
"""What templates read besides the arguments of `apply_chat_template`; nobody else may set these."""


def _byte_of_character() -> dict[str, int]:
    """How vocabularies of bytes spell them: printable ones as themselves, the others by the characters from 256 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(others)}


_BYTE_OF_CHARACTER = _byte_of_character()


class Tokenizer:
    """A Hugging Face tokenizer, narrowed to what serving needs. Safe to call from several threads."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase"):
        self.hf = tokenizer
        marked = {token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.special_ids = frozenset(marked | set(tokenizer.all_special_ids))
        names = {f"<0x{byte:02X}>": byte for byte in range(256)}
        vocabulary = tokenizer.get_vocab()
        self.longest_token = max(map(len, vocabulary), default=1)
        self.byte_of = {i: names[token] for token, i in vocabulary.items() if token in names}
        """byte-fallback tokens: token id -> the byte it stands for"""
        self._decoder = _decoder(tokenizer)
        self._lock = threading.Lock()
        template_arguments = inspect.signature(tokenizer.apply_chat_template).parameters
        self._reserved_names = {*template_arguments, *RESERVED_TEMPLATE_NAMES, *tokenizer.special_tokens_map}
        # transformers before 5.23 has no such argument; drop this when the supported range starts there.
        self._can_sanitize = "sanitize_control_tokens" in template_arguments

    @classmethod
    def from_folder(
        cls, folder: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
    ) -> "Tokenizer":
        """Load from a folder with tokenizer files, or a hub id.

        Raises:
            CheckpointError: there are no usable tokenizer files.
        """
        from transformers import AutoTokenizer

        try:
            found = AutoTokenizer.from_pretrained(
                str(folder), revision=revision, trust_remote_code=trust_remote_code, config=_plain_config(Path(folder))
            )
        except (OSError, ValueError, KeyError, TypeError, ImportError, AttributeError) as error:
            raise CheckpointError(
                f"no usable tokenizer in {folder}: {str(error).splitlines()[0] if str(error) else error!r} "
                "Pass tokenizer=<folder or hub id>, or skip_tokenizer_init=True to work with token ids."
            ) from error
        return cls(found)

    @property
    def has_chat_template(self) -> bool:
        return bool(self.hf.chat_template)

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`, with the special tokens that the model expects around a prompt.

        Raises:
            InvalidRequestError: the text cannot be written as UTF-8 (lone surrogates).
        """
        _check_encodable(text)
        with self._lock:
            return list(self.hf.encode(text, add_special_tokens=add_special_tokens))

    def pieces(self, token_ids: Sequence[int]) -> list[str]:
        """The vocabulary's own spelling of each token."""
        return [str(piece) for piece in self.hf.convert_ids_to_tokens(list(token_ids))]

    def token_bytes(self, token_id: int) -> bytes:
        """What a token adds to a text in UTF-8; several tokens' bytes joined may be one character."""
        if token_id in self.byte_of:
            return bytes([self.byte_of[token_id]])
        text = self.decode([token_id], skip_special_tokens=False)
        spelled = [_BYTE_OF_CHARACTER.get(character) for character in self.pieces([token_id])[0]]
        if REPLACEMENT not in text or None in spelled:
            return text.encode()
        return bytes(byte for byte in spelled if byte is not None)

    def check_known(self, token_ids: Sequence[int], parameter: str) -> None:
        """Raises InvalidRequestError, about the field `parameter`, for ids outside the vocabulary."""
        unknown = next((token_id for token_id in token_ids if not 0 <= token_id < len(self.hf)), None)
        if unknown is not None:
            raise InvalidRequestError(
                f"{parameter} has {unknown}, which is not a token; ids go from 0 to {len(self.hf) - 1}", parameter
            )

    def bad_token_sequences(self, words: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        """How each word can be written, at the start of a text and after a space."""
        spellings = (spelling for word in words for spelling in (word, f" {word.lstrip()}"))
        sequences = (tuple(self.encode(spelling, add_special_tokens=False)) for spelling in spellings)
        return tuple(dict.fromkeys(token_ids for token_ids in sequences if token_ids))

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `token_ids`, spaces left as the model wrote them."""
        return self._decoder(list(token_ids), skip_special_tokens)

    def check_template_arguments(self, arguments: Mapping[str, Any], parameter: str) -> None:
        """Whether a stranger may set these variables: those that the template reads by name, to plain small values.

        Raises:
            InvalidRequestError: about the field `parameter`.
        """
        words = set(re.findall(r"[A-Za-z_]\w*", str(self.hf.chat_template)))
        for name, value in arguments.items():
            if name not in words or name.startswith("_") or name in self._reserved_names:
                message = f"the chat template takes no variable {name[:100]!r} from a request"
                raise InvalidRequestError(message, parameter)
            is_short = isinstance(value, str) and len(value) < 1000
            if not (is_short or value is None or isinstance(value, bool | int | float)):
                raise InvalidRequestError(f"{name!r} must be true, false, a number or a short string", parameter)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, Any]] | None = None,
        template_arguments: Mapping[str, Any] | None = None,
        trust_messages: bool = True,
    ) -> list[int]:
        """Token ids of a conversation.

        Args:
            trust_messages: False reads control tokens inside messages as ordinary text, so that a user's message
                cannot pose as a system message (needs transformers 5.23; earlier versions read them as control tokens).
        Raises:
            InvalidRequestError: there is no chat template, or it refuses these messages.
        """
        if chat_template is None and not self.has_chat_template:
            raise InvalidRequestError(
                "this model has no chat template; pass chat_template=..., or send a plain prompt instead", "messages"
            )
        for message in messages:
            _check_encodable(str(message.get("content") or ""))
        extra = dict(template_arguments or {})
        if self._can_sanitize and not trust_messages:
            extra["sanitize_control_tokens"] = True
        try:
            with self._lock:
                token_ids: Any = self.hf.apply_chat_template(
                    [dict(message) for message in messages],
                    tools=[dict(tool) for tool in tools] if tools else None,
                    chat_template=chat_template,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final_message,
                    tokenize=True,
                    return_dict=False,
                    **extra,
                )
        except Exception as error:  # templates are programs of the checkpoint's author: they may raise anything
            raise InvalidRequestError(f"the chat template refused these messages: {error}", "messages") from error
        return [int(token_id) for token_id in token_ids]


def _decoder(tokenizer: "PreTrainedTokenizerBase") -> Callable[[list[int], bool], str]:
    """What turns ids into text, and whether special tokens are left out; without what transformers does around it,
    which takes longer than a token's text, where the tokenizer's class does nothing of its own there.
    """
    from transformers import PreTrainedTokenizerFast

    cls = type(tokenizer)
    if isinstance(tokenizer, PreTrainedTokenizerFast) and all(
        getattr(cls, name) is getattr(PreTrainedTokenizerFast, name) for name in ("decode", "_decode")
    ):
        backend = tokenizer.backend_tokenizer
        return lambda ids, skips: str(backend.decode(ids, skip_special_tokens=skips))
    return lambda ids, skips: str(tokenizer.decode(ids, skip_special_tokens=skips, clean_up_tokenization_spaces=False))


def _check_encodable(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InvalidRequestError(
            f"the text is not valid Unicode at character {error.start} (a lone surrogate); send valid UTF-8"
        ) from error


def with_token_ids(params: SamplingParams, tokenizer: Tokenizer | None) -> SamplingParams:
    """Parameters as the engine reads them: what they say in words that matters to it, said in tokens."""
    if not params.bad_words or tokenizer is None:
        return params  # without a tokenizer, the engine refuses words
    sequences = (*(params.bad_token_sequences or ()), *tokenizer.bad_token_sequences(params.bad_words))
    return replace(params, bad_words=None, bad_token_sequences=sequences)


class IncrementalDetokenizer:
    """Turns token ids that arrive one by one into text, in pieces that never end inside a character.

    The pieces joined equal `Tokenizer.decode` of all ids. One kind of broken output differs: a tokenizer with byte
    fallback turns a whole run of bytes into replacement characters when its last byte is wrong. Characters that were
    whole when they arrived are not taken back here; only the wrong bytes become replacement characters.

    Each token costs one decode of at most `WINDOW_TOKENS` tokens or so, however long the text is.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special_tokens: bool = True):
        self._tokenizer = tokenizer
        self._skip = tokenizer.special_ids if skip_special_tokens else frozenset[int]()
        self._window: list[int] = []
        self._emitted = ""  # what was given out of the window's text
        self._clean = 0  # tokens at the window's start whose text was given out completely

    def push(self, token_id: int) -> str:
        """Add one token; return the text that is now certain, possibly empty."""
        if token_id in self._skip:
            return ""
        self._window.append(token_id)
        if self._tokenizer.byte_of and self._ends_inside_character():
            return ""  # its next byte decides how the whole run of bytes reads
        text = self._decode(self._window)
        overdue = len(self._window) - self._clean > 2 * UNDECIDED_TOKENS
        certain = _certain(text, overdue)
        if len(certain) < len(text) and not overdue and not certain.startswith(self._emitted):
            return ""  # an unfinished run of byte tokens hides characters that were already given out
        piece = self._emit(certain, text, overdue)
        if len(self._window) >= WINDOW_TOKENS:
            self._cut(self._decode(self._window))
        return piece

    def _ends_inside_character(self) -> bool:
        """The last tokens are byte-fallback tokens that begin a character of UTF-8 and do not end it."""
        for length, token_id in enumerate(reversed(self._window[-3:]), start=1):
            byte = self._tokenizer.byte_of.get(token_id)
            if byte is None or byte < 0x80:
                return False
            if byte >= 0xC0:
                return length < (2 if byte < 0xE0 else 3 if byte < 0xF0 else 4)
        return False

    def flush(self) -> str:
        """Text still held back, at the end of the output; an unfinished character is given as replacement."""
        text = self._decode(self._window)
        piece = self._emit(text, text, overdue=False)
        self._window, self._emitted, self._clean = [], "", 0
        return piece

    def _emit(self, certain: str, text: str, overdue: bool) -> str:
        """Give out what is new in `certain`, a prefix of the window's `text`."""
        if not certain.startswith(self._emitted):
            # A run of byte tokens turned out to be broken: what was given out of it stays, the rest is read by itself.
            del self._window[: self._clean]
            self._clean, self._emitted = 0, ""
            text = self._decode(self._window)
            certain = _certain(text, overdue) if overdue else text
        piece = certain[len(self._emitted) :]
        self._emitted = certain
        if len(certain) == len(text):
            self._clean = len(self._window)
        elif overdue:
            self._clean = max(self._clean, len(self._window) - UNDECIDED_TOKENS)
        return piece

    def _cut(self, text: str) -> None:
        """Shorten a long window to a tail that reads the same by itself, so that every step costs the same."""
        held = len(text) - len(self._emitted)
        first = len(self._window) - self._clean + CONTEXT_TOKENS
        for keep in range(first, min(first + 2 * UNDECIDED_TOKENS, len(self._window))):
            tail = self._decode(self._window[-keep:])
            if len(tail) > held and text.endswith(tail):
                break
        else:
            if len(self._window) < 4 * WINDOW_TOKENS:
                return
            keep = max(first, WINDOW_TOKENS)  # nothing fits (ids without any text): a bounded window matters more
            tail = self._decode(self._window[-keep:])
        self._emitted = tail[: len(tail) - held]
        self._clean -= len(self._window) - keep
        self._window = self._window[-keep:]

    def _decode(self, token_ids: list[int]) -> str:
        return self._tokenizer.decode(token_ids, skip_special_tokens=False)


def _certain(text: str, overdue: bool) -> str:
    """The start of `text` that more tokens cannot change: all but a tail that may be an unfinished character."""
    settled = text.rstrip(REPLACEMENT)
    return text[: max(len(settled), len(text) - UNDECIDED_TOKENS)] if overdue else settled


class StopMatcher:
    """Finds stop strings in text that arrives in pieces; holds back what may be the start of one.

    The string whose last character comes first wins, the longest of those that end there, however the text was cut
    into pieces. Linear time in the text: each string is followed by its failure table (Knuth, Morris and Pratt).
    """

    def __init__(self, stops: Sequence[str], *, include_in_output: bool = False):
        self._stops = tuple(stop for stop in stops if stop)
        self._tables = [_failure_table(stop) for stop in self._stops]
        self._matched = [0] * len(self._stops)  # characters of each stop string that the text ends with
        self._held = ""
        self._include = include_in_output

    def push(self, text: str) -> tuple[str, str | None]:
        """Add a piece. Returns (text that may be shown, the stop string that was completed or None).

        After a match, nothing more may be pushed; what follows the match in the piece is dropped.
        """
        if not self._stops:
            return text, None
        held = self._held + text
        for position in range(len(self._held), len(held)):
            found = self._advance(held[position])
            if found is not None:
                end = position + 1
                self._held = ""
                return held[: end if self._include else end - len(found)], found
        show = len(held) - max(self._matched)
        self._held = held[show:]
        return held[:show], None

    def flush(self) -> str:
        """Text still held back, at the end of the output."""
        held, self._held = self._held, ""
        return held

    def _advance(self, character: str) -> str | None:
        """Follow every stop string by one character; return the longest one that is now complete."""
        found: str | None = None
        for index, (stop, table) in enumerate(zip(self._stops, self._tables, strict=True)):
            matched = self._matched[index]
            while matched and stop[matched] != character:
                matched = table[matched - 1]
            if stop[matched] == character:
                matched += 1
            if matched == len(stop):
                found = max(found or "", stop, key=len)
                matched = table[matched - 1]
            self._matched[index] = matched
        return found


def _failure_table(stop: str) -> list[int]:
    """Entry i: length of the longest proper prefix of `stop` that `stop[: i + 1]` ends with."""
    table = [0] * len(stop)
    length = 0
    for index in range(1, len(stop)):
        while length and stop[index] != stop[length]:
            length = table[length - 1]
        if stop[index] == stop[length]:
            length += 1
        table[index] = length
    return table
