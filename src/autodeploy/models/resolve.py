"""Resolving: a located model goes in, its config and facts come out, every `auto` turned into a fact.

Code that ships inside a checkpoint runs only with `trust_remote_code=True`, and this file and `instantiate.py` are the
only places that could run it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import CONFIG_NAME
from transformers import AutoConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from autodeploy.config import ModelOptions
from autodeploy.errors import CheckpointError, UnsupportedModelError
from autodeploy.models.config_overrides import apply_overrides
from autodeploy.models.limits import longest_context
from autodeploy.models.locate import LocatedModel, locate_model

LENGTH_FIELDS = ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length", "n_ctx")
"""What configs call the longest context, most common first."""


@dataclass(frozen=True, kw_only=True)
class ResolvedModel:
    """A model of which everything is known that must be known to build it.

    Attributes:
        located: where its files are.
        config: the Hugging Face config, `model_kwargs` applied.
        dtype: of weights and activations.
        eos_token_ids: ids that end a generation; empty when neither config says.
        made_for: longest context in tokens that the config says the model was made for, or None.
        max_model_len: longest context in tokens, the user's or the config's; None when neither says.
    """

    located: LocatedModel
    config: PreTrainedConfig
    dtype: torch.dtype
    eos_token_ids: tuple[int, ...] = ()
    made_for: int | None = None
    max_model_len: int | None = None

    @property
    def folder(self) -> Path:
        return self.located.folder


def resolve_model(model: str | LocatedModel, options: ModelOptions) -> ResolvedModel:
    """Read a model's config and what follows from it; reads no weights.

    Args:
        model: what `locate_model` takes or gives.

    Raises:
        ModelNotFoundError, CheckpointError: from locating it.
        UnsupportedModelError: a model type that transformers does not know, or quantised weights.
        ConfigError: `model_kwargs` or `max_model_len` that do not go with the model.
    """
    located = locate_model(model, options) if isinstance(model, str) else model
    config = _load_config(located, options)
    made_for = length_made_for(config)
    return ResolvedModel(
        located=located,
        config=config,
        dtype=_resolve_dtype(config, located, options.dtype),
        eos_token_ids=eos_token_ids(config, located.generation),
        made_for=made_for,
        max_model_len=longest_context(made_for, options.max_model_len),
    )


def _load_config(located: LocatedModel, options: ModelOptions) -> PreTrainedConfig:
    path, stored = located.folder / CONFIG_NAME, located.config
    model_type = stored.get("model_type")
    is_known = isinstance(model_type, str) and model_type in CONFIG_MAPPING
    if not is_known and not options.trust_remote_code:
        advice = "use a newer transformers"
        if "auto_map" in stored:
            advice = "it brings its own code: read that, and pass trust_remote_code=True to run it"
        raise UnsupportedModelError(f"{path} has the unknown model_type {model_type!r}; {advice}")
    if stored.get("quantization_config") and options.load_format != "dummy":
        raise UnsupportedModelError(
            f"{located.folder} holds quantised weights ({stored['quantization_config']}); "
            "use the unquantised checkpoint"
        )
    try:
        config = AutoConfig.from_pretrained(located.folder, trust_remote_code=options.trust_remote_code)
    except Exception as error:  # a config class, possibly the checkpoint's own, refuses in its own ways
        raise CheckpointError(f"{path} is not a valid {model_type} config: {error}") from error
    return apply_overrides(config, options.model_kwargs)


def _resolve_dtype(config: PreTrainedConfig, located: LocatedModel, wanted: str) -> torch.dtype:
    """What the user wants, else what the config says, else what the first floating-point weight has."""
    if wanted != "auto":
        chosen: torch.dtype = getattr(torch, wanted)
        return chosen
    for dtype in (config.dtype, config.get_text_config().dtype):
        if isinstance(dtype, torch.dtype):
            return dtype
    for file in located.stored.files:
        for tensor in file.tensors.values():
            if tensor.is_floating_point():
                return tensor.dtype
    return torch.float32


def eos_token_ids(config: PreTrainedConfig, generation: Mapping[str, Any]) -> tuple[int, ...]:
    """Ids that end a generation: what the generation config says, else the model's config; empty when neither does."""
    for source in (generation, config.to_dict(), config.get_text_config().to_dict()):
        ids = source.get("eos_token_id")
        if ids is not None:
            return tuple(ids) if isinstance(ids, list) else (ids,)
    return ()


def length_made_for(config: PreTrainedConfig) -> int | None:
    """Longest context in tokens that a model was made for, as its config says; None when it does not."""
    values = config.get_text_config().to_dict()
    return next((values[name] for name in LENGTH_FIELDS if isinstance(values.get(name), int)), None)
