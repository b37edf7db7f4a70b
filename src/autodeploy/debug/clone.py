"""A tiny clone: any model goes in, a small float32 module of the same code comes out, to compare a build with.

A Hugging Face model keeps its config, shrunken, and gets random weights that make every part matter. A module of the
user's own cannot be shrunken and is taken as it is.
"""

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.hub import TRANSFORMERS_DYNAMIC_MODULE_NAME

from autodeploy.config import ModelOptions
from autodeploy.debug.shrink import shrink, tiny_model
from autodeploy.errors import ConfigError
from autodeploy.models.instantiate import instantiate
from autodeploy.models.resolve import resolve_model

REMOTE_MODULES = f"{TRANSFORMERS_DYNAMIC_MODULE_NAME}."
"""where transformers imports code that ships inside a checkpoint"""
SMALL_NUMEL = 4_000_000
"""parameters up to which a module is taken as it is"""


@dataclass(frozen=True, kw_only=True)
class Clone:
    """What is checked.

    Attributes:
        module: in the dtype that is checked.
        exact: the same weights in float32; the same object where that is the dtype.
        dtype: dtype of the module's weights.
        vocab_size: token ids below this are known to the model; None where only its logits tell.
        facts: for the report: model, architecture, parameters, dtype.
    """

    module: nn.Module
    exact: nn.Module
    dtype: torch.dtype
    vocab_size: int | None
    facts: dict[str, Any]


def tiny_clone(model: str | nn.Module, options: ModelOptions) -> Clone:
    """A clone of a model by name, of a Hugging Face module, or a copy of another module.

    Raises:
        ConfigError: a module without floating-point parameters. As `resolve_model` for a name.
    """
    exact: nn.Module
    # A module of a checkpoint's own code was made by running that.
    trusted = options.trust_remote_code or type(model).__module__.startswith(REMOTE_MODULES)
    if isinstance(model, str):
        resolved = resolve_model(model, dataclasses.replace(options, load_format="dummy"))
        exact, name = tiny_model(shrink(resolved.config), trust_remote_code=trusted), resolved.located.name
    elif (
        isinstance(model, PreTrainedModel) and sum(parameter.numel() for parameter in model.parameters()) > SMALL_NUMEL
    ):
        exact, name = tiny_model(shrink(model.config), trust_remote_code=trusted), type(model).__name__
    else:
        exact, name = copy.deepcopy(model), type(model).__name__
    if not any(parameter.is_floating_point() for parameter in exact.parameters()):
        raise ConfigError(f"{name} has no floating-point parameters; a language model has some")
    exact = exact.float().eval().requires_grad_(False)
    dtype = torch.float32 if options.dtype == "auto" else getattr(torch, options.dtype)
    module = exact if dtype == torch.float32 else _rounded(exact, dtype, trusted)
    return Clone(
        module=module,
        exact=exact,
        dtype=dtype,
        vocab_size=_vocab_size(exact),
        facts={
            "model": name,
            "architecture": type(exact).__name__,
            "parameters": sum(parameter.numel() for parameter in exact.parameters()),
            "dtype": str(dtype).removeprefix("torch."),
        },
    )


def _vocab_size(module: nn.Module) -> int | None:
    """What the config says; a module of the user's own knows as many tokens as it gives logits."""
    return module.config.get_text_config().vocab_size if isinstance(module, PreTrainedModel) else None


@torch.inference_mode()
def logits_of(module: nn.Module, rows: list[Tensor]) -> Tensor:
    """What a module itself gives for sequences, one after another: float32 `[sum of lengths, V]`."""
    results = []
    for row in rows:
        output = module(row[None])
        logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
        results.append((output[0] if logits is None else logits)[0].float())
    return torch.cat(results)


def _rounded(exact: nn.Module, dtype: torch.dtype, trust_remote_code: bool) -> nn.Module:
    """The module with weights rounded to a dtype, as loading a checkpoint gives it; `exact` gets the rounded values.

    Only parameters change dtype: transformers keeps buffers, and the parameters that a class asks for, in float32.
    """
    if isinstance(exact, PreTrainedModel):
        as_loaded = instantiate(exact.config, dtype=dtype, trust_remote_code=trust_remote_code)
        dtypes = {name: p.dtype for name, p in as_loaded.named_parameters()}
    else:
        dtypes = {name: dtype for name, p in exact.named_parameters() if p.is_floating_point()}
    rounded = copy.deepcopy(exact)
    for (name, parameter), original in zip(rounded.named_parameters(), exact.parameters(), strict=True):
        parameter.data = parameter.data.to(dtypes.get(name, parameter.dtype))
        original.data = parameter.data.to(original.dtype)
    return rounded
