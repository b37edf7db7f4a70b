"""shrink and tiny_model: the config of a model of any size goes in, a tiny random model of the same family comes out.

What is kept is what decides which code runs: kinds of layers and their order, shared key-value heads, differing head
sizes, groups of experts, windows, scalings. What shrinks is what only costs: width, heads, experts, vocabulary, and how
often a kind of layer repeats.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from autodeploy.debug.shrink_layers import kept_layers
from autodeploy.debug.shrink_sizes import Sizes
from autodeploy.errors import UnsupportedModelError

_OF_EVERY_CONFIG = {field.name for field in dataclasses.fields(PreTrainedConfig)}
_GAIN = 1.5
_EMBEDDING_SIZE = 0.2
_NOISE = 0.2


def shrink(config: PreTrainedConfig) -> PreTrainedConfig:
    """A tiny config of the same class, with every kind of layer; `config` is not changed.

    Args:
        config: of any size, a class's default or a checkpoint's own.
    """
    values = _values(config)
    depth, sizes = kept_layers(config, values), Sizes.of(values)
    tiny: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, PreTrainedConfig):
            tiny[name] = shrink(value)
        elif name in depth.values:
            tiny[name] = sizes.per_layer(name, depth.values[name])
        else:
            tiny[name] = sizes.shrink(name, value)
    if depth.per_layer is not None:
        tiny["per_layer_config"] = {
            at: {name: sizes.shrink(name, value, differs=True) for name, value in changes.items()}
            for at, changes in depth.per_layer.items()
        }
    result = type(config)(**tiny)
    for name, value in vars(config).items():  # what a checkpoint adds to the fields of the class
        if not name.startswith("_") and not result._hasattr_without_heterogeneous_validation(name):
            setattr(result, name, sizes.shrink(name, value))
    result.name_or_path = config.name_or_path  # where code of the checkpoint's own lies
    return result


def tiny_model(config: PreTrainedConfig, seed: int = 0, *, trust_remote_code: bool = False) -> PreTrainedModel:
    """The causal language model of a (tiny) config, float32, in eval mode, with weights that make every part matter.

    Initial weights are too small for that: attention would look everywhere alike, and a model that ignored its context
    would pass most comparisons. Matrices are drawn with a gain, norms, biases, decays and sinks get noise.

    Raises:
        UnsupportedModelError: transformers has no causal language model for the config.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            build: Callable[..., nn.Module] = AutoModelForCausalLM.from_config
            module = build(config, dtype=torch.float32, trust_remote_code=trust_remote_code)
        except ValueError as error:
            raise UnsupportedModelError(f"no causal language model for type {config.model_type!r}: {error}") from error
    module.to(dtype=torch.float32)  # parts that a class keeps in another dtype, too
    model: PreTrainedModel = module.eval().requires_grad_(False)  # type: ignore[assignment]
    _draw_weights(model, torch.Generator().manual_seed(seed))
    return model


def _values(config: PreTrainedConfig) -> dict[str, Any]:
    """The fields that describe this model, rather than every config; by name, with the value for all layers."""
    names = {field.name for field in dataclasses.fields(config)}
    if not names - _OF_EVERY_CONFIG:  # a class of a checkpoint's own code, written without fields
        names |= {name for name in vars(config) if not name.startswith("_")}
    names -= _OF_EVERY_CONFIG - {"is_encoder_decoder"}
    return {name: config._getattr_without_heterogeneous_validation(name, None) for name in sorted(names)}


def _draw_weights(model: nn.Module, generator: torch.Generator) -> None:
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for parameter in model.parameters():
        if parameter.is_floating_point():
            _draw(parameter, generator, is_table=id(parameter) in tables)
    persistent = set(model.state_dict())
    for name, buffer in model.named_buffers():
        if name in persistent and buffer.is_floating_point() and not buffer.any():
            _draw(buffer, generator, is_table=False)  # such as the correction that balances experts: zero until trained


def _draw(weight: Tensor, generator: torch.Generator, *, is_table: bool) -> None:
    noise = torch.randn(weight.shape, generator=generator)
    if is_table:
        weight.copy_(_EMBEDDING_SIZE * noise)
    elif weight.dim() >= 2 and not _has_meaning(weight):
        weight.copy_(_GAIN * weight.shape[-1] ** -0.5 * noise)
    else:
        weight.copy_(weight.nan_to_num(0.0).clamp(-1e3, 1e3) + _NOISE * noise)


def _has_meaning(weight: Tensor) -> bool:
    """Whether an initialiser put certain numbers here (such as decays) rather than noise around zero."""
    return bool(weight.mean().abs() > 0.5 * weight.std())
