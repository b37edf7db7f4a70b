"""Instantiating: a config goes in, the model's nn.Module comes out, its parameters without storage.

Parameters are on the meta device whatever the size of the model; buffers (rotary frequencies, masks) are small and are
computed by the model's own code, so they are real and on the CPU.
"""

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from accelerate import init_empty_weights  # type: ignore[import-untyped]
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from autodeploy.errors import UnsupportedModelError

LARGE_NUMEL = {torch.empty: 2**24, torch.zeros: 2**27, torch.ones: 2**27}
"""From how many elements a tensor is taken for a weight. A buffer, whose zeros count, may be a table of 4096 x 4096."""
FILLS = ("normal_", "uniform_", "trunc_normal_", "kaiming_uniform_", "xavier_uniform_", "zeros_", "ones_", "constant_")
"""functions that give a tensor its first values"""


def instantiate(config: PreTrainedConfig, *, dtype: torch.dtype, trust_remote_code: bool = False) -> nn.Module:
    """Build the causal language model of `config`, in eval mode, without gradients and with tied weights tied.

    Args:
        config: is copied, not changed.
        dtype: of parameters, except those that the model's class asks to keep in float32.
        trust_remote_code: run model code that ships inside the checkpoint.

    Raises:
        UnsupportedModelError: transformers has no causal language model for this config.
    """
    config = copy.deepcopy(config)
    try:
        with init_empty_weights(include_buffers=False), _LargeOnMeta():
            build: Callable[..., PreTrainedModel] = AutoModelForCausalLM.from_config
            model = build(config, dtype=dtype, trust_remote_code=trust_remote_code)
    except ValueError as error:
        hint = ""
        if "auto_map" in config.to_dict() and not trust_remote_code:
            hint = "; the checkpoint brings its own code, which runs only with trust_remote_code=True"
        raise UnsupportedModelError(
            f"transformers cannot build a causal language model of type {config.model_type!r}: {error}{hint}"
        ) from error
    _keep_in_float32(model, dtype)
    model.tie_weights()  # registering a parameter on meta gives each name its own; tied names must be one object again
    _require_real_buffers(model)
    model.requires_grad_(False)
    model.train(False)
    return model


class _LargeOnMeta(TorchFunctionMode):
    """Lets a large `torch.empty`, or a very large `torch.zeros` or `torch.ones`, without a device give a meta tensor.

    Meta tensors are left unfilled.

    Parameters are made by these and put on meta when they are registered. Without this, one stacked expert weight of
    20 GB would be reserved, or even written, for a moment before, which a machine of 16 GB refuses.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        options = dict(kwargs or {})
        filled = options.get("tensor", args[0] if args else None)
        if func.__name__ in FILLS and isinstance(filled, torch.Tensor) and filled.is_meta:
            return filled  # it has no values, and going through the motions takes longer than making the model
        if func in LARGE_NUMEL and options.get("device") is None:
            on_meta = func(*args, **{**options, "device": "meta"})
            if on_meta.numel() >= LARGE_NUMEL[func]:
                return on_meta
        return func(*args, **options)


def _keep_in_float32(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Give weights the dtype that loading by transformers gives them: some classes name ones that stay in float32."""
    patterns = [pattern.replace("*", r".*") for pattern in model._get_dtype_plan(dtype)]
    if not patterns:
        return
    kept = re.compile("|".join(patterns))
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if kept.search(f"{module_name}.{name}"):
                setattr(module, name, nn.Parameter(parameter.float(), requires_grad=False))
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.is_floating_point() and kept.search(f"{module_name}.{name}"):
                setattr(module, name, buffer.float())


def _require_real_buffers(model: nn.Module) -> None:
    """A large `torch.empty` buffer is on meta; a persistent one comes with the checkpoint, others are lost."""
    for module_name, module in model.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if not buffer.is_meta:
                continue
            if name in module._non_persistent_buffers_set:
                raise UnsupportedModelError(
                    f"buffer {module_name}.{name} of {buffer.numel():,} elements was left on meta and is not "
                    "stored in checkpoints; make it with torch.zeros, or register it as persistent"
                )
            setattr(module, name, torch.zeros(buffer.shape, dtype=buffer.dtype))
