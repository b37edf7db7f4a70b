"""Flags of the command line: option dataclasses go in, one flag per option comes out, and those of some commands alone.

Names, defaults and help texts are those of `autodeploy.config` and `autodeploy.server.options`.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from cyclopts import Parameter, Token

from autodeploy.config import ALIASES, CompileOptions, EngineOptions, ModelOptions
from autodeploy.errors import ConfigError
from autodeploy.server.options import ServerOptions

OPTION_PARTS = (ModelOptions, CompileOptions, EngineOptions)


def _from_json(_: Any, tokens: tuple[Token, ...]) -> dict[str, Any]:
    value = json.loads(tokens[0].value)
    if not isinstance(value, dict):
        raise ValueError(f"expected a JSON object such as {{...}}, got {tokens[0].value}")
    return value


def _flag(field: dataclasses.Field[Any], hint: Any) -> tuple[str, Any, None]:
    """One option as a flag that is None unless given, so that the option's own default stays the only one."""
    has_factory = field.default_factory is not dataclasses.MISSING
    default = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
    if default == ():  # a list, one entry per flag
        return field.name, Annotated[list[str] | None, Parameter(negative="")], None
    names = tuple(f"--{alias.replace('_', '-')}" for alias, name in ALIASES.items() if name == field.name)
    shown = None if default is None or has_factory else str(default)
    show_default = False if shown is None else lambda _, shown=shown: shown
    if any(get_origin(each) is Mapping for each in (hint, *get_args(hint))):  # given as JSON
        json_flag = Parameter(alias=names, converter=_from_json, accepts_keys=False, n_tokens=1, show_default=False)
        return field.name, Annotated[dict[str, Any] | None, json_flag], None
    return field.name, Annotated[hint | None, Parameter(alias=names, show_default=show_default)], None


def _option_flags(name: str, about: str, parts: tuple[type[Any], ...]) -> type[Any]:
    """A dataclass with one flag per option, documented by the option dataclasses' docstrings."""
    flags = [_flag(field, get_type_hints(part)[field.name]) for part in parts for field in dataclasses.fields(part)]
    made = dataclasses.make_dataclass(name, flags, frozen=True, kw_only=True)
    attributes = "".join((part.__doc__ or "").split("Attributes:\n")[1].rstrip() + "\n" for part in parts)
    made.__doc__ = f"{about}\n\nAttributes:\n{attributes}"
    made.__module__ = __name__  # where cyclopts looks up the annotations
    return made


ModelFlags = _option_flags("ModelFlags", "Options of a deployment.", OPTION_PARTS)
ServerFlags = _option_flags("ServerFlags", "Options of the server.", (ServerOptions,))
NO_FLAGS, NO_SERVER_FLAGS = ModelFlags(), ServerFlags()


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingFlags:
    """How the answer is sampled.

    Attributes:
        max_tokens: most tokens to generate.
        temperature: 0 takes the most likely token; default: the model's own.
        top_p: keep the fewest most likely tokens that together have this probability.
        top_k: keep this many of the most likely tokens.
    """

    max_tokens: int = 256
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None

    def values(self) -> dict[str, Any]:
        """As keyword arguments of `SamplingParams`, those that were given."""
        values = {
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
        }
        return {name: value for name, value in values.items() if value is not None}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckTexts:
    """Texts of a full check.

    Attributes:
        prompt: with --full, a text to continue; may be given several times. Default: a few built-in ones.
        prompt_file: with --full, a file whose whole text is a prompt; may be given several times.
        max_tokens: with --full, tokens to generate after each prompt; default: 32.
        perplexity: with --full, a text file whose perplexity is compared; default: the Zen of Python.
    """

    prompt: list[str] | None = None
    prompt_file: list[Path] | None = None
    max_tokens: int | None = None
    perplexity: Path | None = None

    def values(self) -> dict[str, Any]:
        """As keyword arguments of `full_check`, those that were given."""
        prompts = [*(self.prompt or []), *(_read_text(path) for path in self.prompt_file or [])]
        perplexity = None if self.perplexity is None else (self.perplexity.name, _read_text(self.perplexity))
        values = {"prompts": prompts or None, "max_tokens": self.max_tokens, "perplexity": perplexity}
        return {name: value for name, value in values.items() if value is not None}


Flags = Annotated[ModelFlags, Parameter(name="*")]  # type: ignore[valid-type]  # made at import time
Listening = Annotated[ServerFlags, Parameter(name="*")]  # type: ignore[valid-type]  # made at import time
Sampling = Annotated[SamplingFlags, Parameter(name="*")]
Texts = Annotated[CheckTexts, Parameter(name="*")]
OWN_SAMPLING, NO_TEXTS = SamplingFlags(), CheckTexts()
ConfigFile = Annotated[Path | None, Parameter(name="--config")]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read a text from {path}: {error}") from error
