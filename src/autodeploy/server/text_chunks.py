"""Chunks of a stream that add text and nothing else, as most do: all but the text is written once per choice."""

import json
import secrets
from collections.abc import Callable

from pydantic import BaseModel

_quoted = json.JSONEncoder(ensure_ascii=False).encode
_PLACE = secrets.token_hex()
"""Stands where the text will be, once or more, and nowhere else: nobody can guess it."""


class TextChunks:
    """Writes chunks as JSON, the same as the model's own `model_dump_json`, several times as fast.

    Args:
        make: the chunk of a choice (its index) that adds a text; nothing but the text differs between two of a choice.
    """

    def __init__(self, make: Callable[[int, str], BaseModel]):
        self._make = make
        self._around: dict[int, list[str]] = {}

    def json(self, index: int, text: str) -> str:
        """The chunk that adds `text` to choice `index`."""
        around = self._around.get(index)
        if around is None:
            around = self._around[index] = self._make(index, _PLACE).model_dump_json().split(_quoted(_PLACE))
        return _quoted(text).join(around)
