"""What the routes work with: an engine, a tokenizer, and the names of the model."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from starlette.exceptions import HTTPException

from autodeploy.errors import ConfigError, InvalidRequestError
from autodeploy.runtime.async_engine import AsyncEngine
from autodeploy.runtime.constraints import Constraints
from autodeploy.runtime.tokenizer import Tokenizer


@dataclass
class Lifecycle:
    """Where the server is. Draining, it ends what runs and should get nothing new; `at_end` is called after that."""

    is_draining: bool = False
    at_end: list[Callable[[], object]] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """One model, as clients see it.

    Attributes:
        names: names that clients may ask for; the first is the one answers carry.
        tokenizer: None serves token ids only.
        max_model_len: longest context in tokens, told to clients.
        constraints: compiles what guided requests ask for; the engine's own keeps the same grammars.
        default_sampling: `SamplingParams` values for what a request leaves out.
    """

    engine: AsyncEngine
    names: Sequence[str]
    tokenizer: Tokenizer | None = None
    max_model_len: int | None = None
    constraints: Constraints = field(default_factory=Constraints)
    default_sampling: Mapping[str, Any] = field(default_factory=dict)
    lifecycle: Lifecycle = field(default_factory=Lifecycle)

    def require_tokenizer(self, parameter: str) -> Tokenizer:
        """Raises InvalidRequestError, about the field `parameter`, where there is none."""
        if self.tokenizer is None:
            raise InvalidRequestError("this server has no tokenizer; send prompts as token ids", parameter)
        return self.tokenizer

    def checked_name(self, name: str | None) -> str:
        """The name an answer carries. Raises HTTPException 404 for a model that is not served."""
        if name is not None and name not in self.names:
            raise HTTPException(404, f"the model {name[:200]!r} does not exist; served: {', '.join(self.names)}")
        return name or self.names[0]

    def use_chat_template(self, text: str) -> None:
        """From now on, instead of the model's own. Raises ConfigError for one that cannot write a conversation."""
        if self.tokenizer is None:
            raise ConfigError("chat_template needs a tokenizer, and this server has none; leave it out")
        self.tokenizer.hf.chat_template = text
        try:
            self.tokenizer.apply_chat_template([{"role": "user", "content": "hello"}])
        except InvalidRequestError as error:
            raise ConfigError(f"chat_template cannot write a user's message: {error}") from error

    @property
    def chat_template(self) -> str:
        """The template's text; "" where there is none."""
        return "" if self.tokenizer is None else str(self.tokenizer.hf.chat_template or "")
