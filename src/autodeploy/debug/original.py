"""The original: a model as the user names it goes in, transformers' own module of the same weights comes out.

A checkpoint is loaded by transformers itself, from the same folder and with the same config, in the dtype that is asked
for; a module of the user's own is its own original, and a copy of it is in another dtype.
"""

import contextlib
import copy
import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig
from transformers.utils import logging as transformers_logging

from autodeploy.config import ModelOptions
from autodeploy.errors import ConfigError, UnsupportedModelError
from autodeploy.models.locate import LocatedModel, locate_model
from autodeploy.models.resolve import resolve_model
from autodeploy.runtime.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Original:
    """What a build is compared with.

    Attributes:
        name: for people.
        buildable: what `build` takes for the same model.
        num_parameters: elements of all weights, as stored.
        tokenizer: None where there is none.
    """

    name: str
    buildable: LocatedModel | nn.Module
    num_parameters: int
    tokenizer: Tokenizer | None
    config: PreTrainedConfig | None
    trust_remote_code: bool

    @contextlib.contextmanager
    def loaded(self, dtype: torch.dtype, device: torch.device) -> Iterator[nn.Module]:
        """The module with its weights, in eval mode; it leaves memory afterwards.

        Raises:
            UnsupportedModelError: transformers cannot load the checkpoint.
        """
        if isinstance(self.buildable, nn.Module):
            module = _in_dtype(self.buildable, dtype)
        else:
            module = self._from_checkpoint(self.buildable, dtype)
        try:
            yield module.eval().to(device)
        finally:
            del module
            gc.collect()

    def _from_checkpoint(self, located: LocatedModel, dtype: torch.dtype) -> nn.Module:
        load: Callable[..., nn.Module] = AutoModelForCausalLM.from_pretrained
        try:
            with _without_bars():
                return load(
                    located.folder,
                    config=copy.deepcopy(self.config),
                    dtype=dtype,
                    trust_remote_code=self.trust_remote_code,
                )
        except Exception as error:  # whatever the model's code, possibly the checkpoint's own, thinks of it
            raise UnsupportedModelError(
                f"transformers itself cannot load {located.folder}, so there is nothing to compare with:"
                f" {type(error).__name__}: {error}; check without --full"
            ) from error


def original_of(model: str | nn.Module, options: ModelOptions) -> Original:
    """Find a model and what is known of it; loads no weights.

    Raises:
        ConfigError: there are no real weights. As `resolve_model` for a name.
    """
    if options.load_format == "dummy":
        raise ConfigError("load_format='dummy' makes weights up, and a full check compares real ones; leave it out")
    tokenizer = options.tokenizer
    known: dict[str, Any] = {"trust_remote_code": options.trust_remote_code}
    if isinstance(model, nn.Module):
        known |= {"name": type(model).__name__, "buildable": model, "config": None}
        known["num_parameters"] = sum(parameter.numel() for parameter in model.parameters())
    else:
        located = locate_model(model, options)
        known |= {"name": located.name, "buildable": located, "config": resolve_model(located, options).config}
        known["num_parameters"] = sum(
            tensor.numel() for file in located.stored.files for tensor in file.tensors.values()
        )
        tokenizer = tokenizer or str(located.folder)
    wanted = tokenizer is not None and not options.skip_tokenizer_init
    return Original(
        tokenizer=Tokenizer.from_folder(str(tokenizer), trust_remote_code=options.trust_remote_code)
        if wanted
        else None,
        **known,
    )


def _in_dtype(module: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A copy, so that moving it to a device or a dtype leaves the user's module as it is."""
    copied = copy.deepcopy(module)
    return copied.float() if dtype == torch.float32 else copied


@contextlib.contextmanager
def _without_bars() -> Iterator[None]:
    """No progress bars of transformers' own between our lines."""
    were_on = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if were_on:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
