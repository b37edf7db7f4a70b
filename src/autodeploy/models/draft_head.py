"""Draft heads: a small module that drafts from a model's hidden states; made from a checkpoint, or a user's own.

A head is any module with `forward(inputs_embeds, hidden_states) -> [1, T, H]` (and `position_ids`, if it takes them).
Row t has the embedding of a token and what the model's last linear layer read of the token before it; the result stands
for what that layer would read of the token itself, so that the layer makes logits of it, and the head's next row can
start from it. `HeadRow` puts the model's own embedding and last layer around a head.

A checkpoint's head is `DraftHead`: two vectors side by side, one product, one layer of the model's family. Where the
published layouts call their parts what is `LAYOUTS`.
"""

import copy
import inspect
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from autodeploy.checkpoint.files import StoredTensors
from autodeploy.checkpoint.index import CheckpointIndex, ModuleReader
from autodeploy.checkpoint.recipe import ReadTensor
from autodeploy.config import ModelOptions, SpeculativeOptions
from autodeploy.errors import CheckpointError, ConfigError, UnsupportedModelError
from autodeploy.models.instantiate import instantiate
from autodeploy.models.locate import LocatedModel, locate_model
from autodeploy.models.resolve import resolve_model

HEAD_PREFIX = "draft_head."
"""Before the names of a head's own weights, where they stand beside the model's."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """What a published kind of checkpoint calls the parts of a head, each behind `prefix`; None: it has none.

    Attributes:
        prefix: may hold `{layers}`, the number of the model's own layers.
        layer: before the names of the layer's weights, which are those of the model's family; "" takes all others.
    """

    prefix: str = ""
    fc: str = "fc"
    layer: str = "layers.0."
    embed_norm: str | None = None
    hidden_norm: str | None = None
    norm: str | None = None

    @property
    def has_norms(self) -> bool:
        return self.norm is not None


LAYOUTS: dict[str, tuple[Layout, ...]] = {
    # A folder of its own; its config is that of one layer, which has no norm before attention and none behind it.
    "eagle": (Layout(),),
    # In the model's own folder: beside its layers, or as one layer more.
    "mtp": (
        Layout(prefix="mtp.", embed_norm="pre_fc_norm_embedding", hidden_norm="pre_fc_norm_hidden", norm="norm"),
        Layout(
            prefix="model.layers.{layers}.",
            fc="eh_proj",
            layer="",
            embed_norm="enorm",
            hidden_norm="hnorm",
            norm="shared_head.norm",
        ),
    ),
}
"""By method of `speculative_config`; of several, the first whose product is stored."""


class DraftHead(nn.Module):
    """`body(fc([embed_norm(embedding), hidden_norm(hidden)]))`, with a model of one layer as body.

    Args:
        body: a base model of transformers; its embedding is left aside.
        has_norms: norms like the body's last one before the product.
    """

    def __init__(self, body: PreTrainedModel, hidden_size: int, *, has_norms: bool, has_bias: bool) -> None:
        super().__init__()
        self.body = body
        norm = body.get_submodule("norm")
        self.embed_norm = copy.deepcopy(norm) if has_norms else nn.Identity()
        self.hidden_norm = copy.deepcopy(norm) if has_norms else nn.Identity()
        if not has_norms:
            body.norm = nn.Identity()
        self.fc = nn.Linear(2 * hidden_size, hidden_size, bias=has_bias, device="meta", dtype=body.dtype)

    def forward(self, inputs_embeds: Tensor, hidden_states: Tensor, position_ids: Tensor) -> Tensor:
        both = torch.cat((self.embed_norm(inputs_embeds), self.hidden_norm(hidden_states)), dim=-1)
        output = self.body(inputs_embeds=self.fc(both), position_ids=position_ids, use_cache=False)
        result: Tensor = output.last_hidden_state
        return result


class HeadRow(nn.Module):
    """A head between a model's own embedding and last layer: token ids and hidden states go in, logits come out."""

    def __init__(self, model: nn.Module, head: nn.Module) -> None:
        """Raises UnsupportedModelError for a model that does not say what its embedding and its last layer are."""
        super().__init__()
        embedding, output = None, None
        if isinstance(model, PreTrainedModel):
            embedding = model.get_input_embeddings()
            output = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        if not isinstance(embedding, nn.Module) or not isinstance(output, nn.Linear):
            raise UnsupportedModelError(
                f"{type(model).__name__} does not say which modules are its embedding and its last linear layer, and a "
                "draft head needs both; use a model of transformers, or another method in speculative_config"
            )
        self.embedding, self.head, self.output = embedding, head, output
        self._takes_positions = "position_ids" in inspect.signature(head.forward).parameters

    @property
    def hidden_size(self) -> int:
        assert isinstance(self.output, nn.Linear)
        return self.output.in_features

    def forward(self, input_ids: Tensor, hidden_states: Tensor, position_ids: Tensor) -> Tensor:
        positions = {"position_ids": position_ids} if self._takes_positions else {}
        embedded = self.embedding(input_ids)
        logits: Tensor = self.output(self.head(inputs_embeds=embedded, hidden_states=hidden_states, **positions))
        return logits

    def renamed(self, model: nn.Module) -> Callable[[str], str]:
        """The names of this module's weights -> what a reader of both calls them: the model's own name, or one of the
        head's behind `HEAD_PREFIX`.
        """
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        shared = {
            name: names[id(parameter)]
            for name, parameter in self.named_parameters(remove_duplicate=False)
            if id(parameter) in names
        }
        return lambda name: shared.get(name, HEAD_PREFIX + name.removeprefix("head."))


def head_beside(
    model: nn.Module,
    located: LocatedModel | None,
    speculation: SpeculativeOptions,
    options: ModelOptions,
    dtype: torch.dtype,
) -> tuple[HeadRow, ReadTensor]:
    """The head that `speculation` names, between the model's own ends, and how the head's weights are read.

    Args:
        model: the model to draft for, parameters on any device.
        located: where it was found, if it was.
        options: how the model's files are read; its limit and overrides say nothing of the head.
        dtype: of the model's weights.
    Raises:
        ConfigError, CheckpointError, UnsupportedModelError: a head that does not fit the model.
    """
    named = speculation.model
    if isinstance(named, nn.Module):
        return HeadRow(model, named), head_of_module(named, dtype)
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"a head from a checkpoint needs the config of the model it drafts for, and {type(model).__name__} is no "
            "model of transformers; pass the head as a module"
        )
    where = located if named is None else os.fspath(named)
    if where is None:
        raise ConfigError("speculative_config has no model, and a module brings no head with it; name its folder")
    chosen = replace(options, revision=None, max_model_len=None, model_kwargs={})
    head, read = head_of_checkpoint(where, speculation.method, model.config, chosen, dtype)
    return HeadRow(model, head), read


def head_of_module(module: nn.Module, dtype: torch.dtype) -> ReadTensor:
    """Reads the weights of a user's own head.

    Raises:
        ConfigError: its forward does not take what a head is given, or its weights have another dtype than the model's.
    """
    parameters = inspect.signature(module.forward).parameters
    missing = [name for name in ("inputs_embeds", "hidden_states") if name not in parameters]
    if missing:
        raise ConfigError(
            f"{type(module).__name__}.forward does not take {' and '.join(missing)}; a draft head maps inputs_embeds "
            "and hidden_states, [1, T, H] each, to hidden states [1, T, H]"
        )
    others = {parameter.dtype for parameter in module.parameters()} - {dtype}
    if others:
        raise ConfigError(f"the draft head has weights in {others.pop()}, the model in {dtype}; convert the head first")
    module.eval()
    return ModuleReader(module).read


def head_of_checkpoint(
    model: str | LocatedModel, method: str, target: PreTrainedConfig, options: ModelOptions, dtype: torch.dtype
) -> tuple[nn.Module, ReadTensor]:
    """A head from a checkpoint folder, parameters on the meta device, and how its weights are read.

    Args:
        model: a folder or hub id, or where it was found.
        method: a key of `LAYOUTS`.
        target: config of the model to draft for.
        dtype: of the model; the head gets the same.
    Raises:
        CheckpointError: weights that are missing, or in a layout that is none of the known ones.
    """
    located = locate_model(model, options) if isinstance(model, str) else model
    layout, prefix = _layout(located, method, target)
    is_apart = method == "eagle"
    config = resolve_model(located, options).config if is_apart else target
    text = copy.deepcopy(config.get_text_config())
    causal = instantiate(text if is_apart else _with_one_more_layer(text), dtype=dtype)
    assert isinstance(causal, PreTrainedModel)
    body = _body_of_last_layer(causal, has_norms=layout.has_norms)
    hidden_size = int(target.get_text_config().hidden_size)
    has_bias = f"{prefix}{layout.fc}.bias" in located.stored.file_of
    head = DraftHead(body, hidden_size, has_norms=layout.has_norms, has_bias=has_bias)
    head.requires_grad_(False).eval()
    return head, _reader(head, causal, located.stored, layout, prefix)


def _layout(located: LocatedModel, method: str, target: PreTrainedConfig) -> tuple[Layout, str]:
    """The first layout of the method whose product is stored, and its prefix."""
    names = located.stored.file_of
    tried = []
    for layout in LAYOUTS[method]:
        prefix = layout.prefix.format(layers=target.get_text_config().num_hidden_layers)
        if f"{prefix}{layout.fc}.weight" in names and "d2t" not in names:
            return layout, prefix
        tried.append(f"{prefix}{layout.fc}.weight")
    found = ", ".join(sorted(names)[:4]) or "no tensors"
    reduced = "; it has d2t, a vocabulary of its own, which is not supported" if "d2t" in names else ""
    raise CheckpointError(
        f"{located.folder} is no checkpoint of a draft head for method {method!r}: expected {' or '.join(tried)}, found"
        f" {found}{reduced}"
    )


def _with_one_more_layer(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of a model whose last layer is the one behind all of the model's own; it attends to all tokens."""
    values = config.to_dict()
    count = values["num_hidden_layers"]
    kinds = {"layer_types": "full_attention"}
    for name, value in values.items():
        if isinstance(value, list) and len(value) == count:
            values[name] = [*value, kinds.get(name, value[-1])]
    values["num_hidden_layers"] = count + 1
    result: PreTrainedConfig = type(config).from_dict(values)
    return result


def _body_of_last_layer(causal: PreTrainedModel, *, has_norms: bool) -> PreTrainedModel:
    """The base model with its last layer alone; without norms, neither that layer's first nor the last one are there.

    Raises:
        UnsupportedModelError: its parts have other names than transformers' decoders usually give them.
    """
    body: Any = causal.base_model
    parts = dict(body.named_children())
    layers = parts.get("layers")
    last: Any = layers[-1] if isinstance(layers, nn.ModuleList) else None
    if last is None or "norm" not in parts or not (has_norms or "input_layernorm" in dict(last.named_children())):
        raise UnsupportedModelError(
            f"a draft head needs one layer of {type(causal).__name__}, which does not keep its parts as 'layers', "
            "'norm' and 'input_layernorm'; pass the head as a module instead"
        )
    body.layers = nn.ModuleList([last])
    body.config.num_hidden_layers = 1
    if body.config.to_dict().get("layer_types"):
        body.config.layer_types = body.config.layer_types[-1:]
    if not has_norms:
        last.input_layernorm = nn.Identity()
    result: PreTrainedModel = body
    return result


def _reader(head: DraftHead, causal: PreTrainedModel, stored: StoredTensors, layout: Layout, prefix: str) -> ReadTensor:
    """Reads the head's weights by their names in `head`: the layer's through transformers' own conversions."""
    path = f"{causal.base_model_prefix}."
    own = {
        "fc.weight": f"{prefix}{layout.fc}.weight",
        "fc.bias": f"{prefix}{layout.fc}.bias",
        "embed_norm.weight": f"{prefix}{layout.embed_norm}.weight",
        "hidden_norm.weight": f"{prefix}{layout.hidden_norm}.weight",
        "body.norm.weight": f"{prefix}{layout.norm}.weight",
    }
    layer = re.compile(re.escape(prefix + layout.layer))
    layers = {
        f"{path}layers.0.{name[match.end() :]}": name
        for name in stored.file_of
        if (match := layer.match(name)) and name not in own.values()
    }
    index = CheckpointIndex(stored.renamed(layers), causal)

    def read(name: str) -> Tensor:
        if name in own:
            return _stored(own[name], stored)
        return index.read(path + name.removeprefix("body."))

    return read


def _stored(name: str, stored: StoredTensors) -> Tensor:
    if name not in stored.file_of:
        raise CheckpointError(f"the draft head has no weight {name!r}; its checkpoint is incomplete")
    return stored.read(name)
