"""Which architectures there are: transformers' own table in, configs and the rules that sort them out."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from tests.sweep.reference import accepts, logits_of

FAMILIES = Path(__file__).parents[1] / "models" / "families.yaml"

SEQ2SEQ = "encoder-decoder: its config says is_encoder_decoder"
ENCODER = (
    "encoder: a later token changes earlier logits, and its config says is_decoder=False or its class has no cache"
)


def names() -> tuple[str, ...]:
    """Model types that transformers maps to `AutoModelForCausalLM`, in its order."""
    return tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def config_of(model_type: str) -> PreTrainedConfig:
    """The class's default config, with what `families.yaml` adds where the defaults make no model a checkpoint has."""
    fields: dict[str, Any] = yaml.safe_load(FAMILIES.read_text(encoding="utf-8")).get(model_type, {})
    config: PreTrainedConfig = CONFIG_MAPPING[model_type](**fields)
    return config


def same_architecture(results: Sequence[dict[str, Any]]) -> dict[str, str]:
    """Entry -> the entry it repeats: one with the same model class, or with the same class of text config.

    Among such entries the one whose config is itself the text config is the original, else the first.
    """
    first: dict[str, str] = {}
    aliases: dict[str, str] = {}
    for result in sorted(results, key=lambda result: bool(result.get("is_composite"))):
        keys = [key for key in (result.get("class"), result.get("text_config")) if key]
        known = next((first[key] for key in keys if key in first), None)
        if known is not None:
            aliases[result["name"]] = known
        for key in keys:
            first.setdefault(key, known or result["name"])
    return aliases


def why_no_decoder(model: PreTrainedModel, config: PreTrainedConfig, ids: Tensor) -> str | None:
    """The rule by which a model is no decoder; None for one that is.

    Args:
        config: as transformers' defaults have it, not told to be a decoder.
        ids: `[1, T]`, some tokens to try it on.
    """
    if config.is_encoder_decoder:
        return SEQ2SEQ
    is_said_to_be_none = config.to_dict().get("is_decoder") is False or not accepts(model, "past_key_values")
    return ENCODER if is_said_to_be_none and reads_ahead(model, ids) else None


def reads_ahead(model: PreTrainedModel, ids: Tensor) -> bool:
    """Whether a change of the last token changes earlier logits."""
    changed = torch.cat([ids[:, :-1], (ids[:, -1:] + 1) % 100], 1)
    before, after = logits_of(model, ids)[:-1], logits_of(model, changed)[:-1]
    return bool((before - after).abs().max() > 1e-3 * before.abs().max())
