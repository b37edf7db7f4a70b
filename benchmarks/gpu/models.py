"""Models by name: an entry of seed_models.yaml goes in; its config as a folder, or a module with weights, comes out."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from autodeploy.checkpoint.index import DummyReader
from autodeploy.debug.shrink import shrink
from tests import seed_models


def subject(name: str, folder: Path, *, smoke: bool) -> str | nn.Module:
    """What `build` takes: a folder written below `folder` (its weights are to be `load_format=dummy`), or a module.

    Args:
        smoke: a tiny model of the same family.
    """
    fields = seed_models.DATA["configs"][name]
    if "module" in fields:
        return seed_models.tiny(fields) if smoke else _with_random_weights(seed_models.without_weights(fields))
    config = _config(name, smoke=smoke)
    target = folder / name
    config.save_pretrained(target)
    return str(target)


def reference(name: str, device: torch.device, *, smoke: bool) -> Any:
    """Transformers' own model with random weights, made on the device.

    Raises:
        LookupError: a model that transformers does not have.
    """
    if "module" in seed_models.DATA["configs"][name]:
        raise LookupError("a research model, which transformers does not have")
    with device:
        model: Any = AutoModelForCausalLM.from_config(_config(name, smoke=smoke), dtype=torch.bfloat16)
    return model.eval().requires_grad_(False)


def _config(name: str, *, smoke: bool) -> Any:
    config: Any = seed_models.hf_config(seed_models.DATA["configs"][name])
    config = shrink(config) if smoke else config
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    config.dtype = torch.bfloat16
    return config


def _with_random_weights(module: nn.Module) -> nn.Module:
    """Weights as `load_format=dummy` makes them; drawing each number would take minutes."""
    reader = DummyReader(module)
    real = module.to_empty(device="cpu")
    for name, parameter in real.named_parameters():
        parameter.data.copy_(reader.read(name))
    return real
