"""LiveModel: the model's own code, run over packed rows and pages as its graph would be, before there is a graph.

Its attention calls go to `cached_attention` through Hugging Face's interfaces, eagerly. That is all it knows: a model
with any other state, or a mask that is passed on as anything but a whole, is refused with `NotLive` and waits for its
graph.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from autodeploy.capture.hooks import Hooks, logits_of, model_arguments, packed_row
from autodeploy.errors import UnsupportedModelError
from autodeploy.graph.model_graph import ATTENTION
from autodeploy.ops.attention import MaskFacts, attention, cached_attention
from autodeploy.ops.state import PagedState

EXAMPLE_TOKENS = 7


class NotLive(UnsupportedModelError):
    """The model's own code cannot run over pages; the message says why."""


class LiveModel:
    """A loaded Hugging Face model as a function of batch inputs and states.

    The model belongs to this object from now on: its attention stays pointed at the hooks.

    Attributes:
        states: what the model remembers, by the names of its modules.
        batch_inputs: the batch inputs it reads.
        vocab_size: width of its logits.
        example: token ids of a sequence, and `example_logits`: what the model said to it, run whole and by itself.
    """

    def __init__(self, model: nn.Module, providers: tuple[str, ...] = ()) -> None:
        """Run the model once to find its states.

        Args:
            model: with its weights in memory.
            providers: providers of attention kernels to ask, in order; the reference is asked last.
        Raises:
            NotLive: see above.
        """
        if not isinstance(model, PreTrainedModel) or not model._can_set_attn_implementation():
            raise NotLive(f"{type(model).__name__} does not take its attention from the interface")
        self._model = model
        self._hooks = _LiveHooks({id(module): path for path, module in model.named_modules()}, providers)
        self._hooks.install(model)
        parameters = inspect.signature(model.forward).parameters
        self._keeps_rows = "logits_to_keep" in parameters
        try:
            with torch.inference_mode():
                _, position_ids, cu_seqlens = packed_row([EXAMPLE_TOKENS])
                self._hooks.batch = {"cu_seqlens": cu_seqlens, "position_ids": position_ids}
                self._arguments = model_arguments(model, self._hooks, position_ids)
                vocabulary = int(model.config.get_text_config().vocab_size)
                self.example = torch.arange(1, 1 + EXAMPLE_TOKENS) * 7919 % vocabulary
                logits = logits_of(self._model(self.example[None], **self._arguments))
        except Exception as reason:  # the model's own code stumbles over the hooks in its own ways
            raise NotLive(f"{type(model).__name__} cannot run over a packed row by itself: {reason}") from reason
        writes = dict(self._hooks.state_writes)
        if not self._hooks.states or writes != {ATTENTION: len(self._hooks.states)}:
            raise NotLive(f"it writes states {writes}, of which {len(self._hooks.states)} are attention's")
        self.vocab_size = int(logits.shape[-1])
        self.example_logits = logits[0].float()
        self.states = [spec for pair in self._hooks.states.values() for spec in pair.values()]
        groups = dict.fromkeys(spec.group for spec in self.states)
        named = [f"{name}_{group}" for group in groups for name in ("page_table", "slot_mapping")]
        self.batch_inputs = ("input_ids", "position_ids", "cu_seqlens", "seq_lens", "logits_indices", *named)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Logits `[R, V]` of one step; inputs are `batch_inputs`, then `states`, in order."""
        names = [*self.batch_inputs, *(spec.name for spec in self.states)]
        batch = dict(zip(names, inputs, strict=True))
        self._hooks.batch = batch
        arguments = {name: batch.get(name, value) for name, value in self._arguments.items()}
        if self._keeps_rows:
            arguments["logits_to_keep"] = batch["logits_indices"]
        logits = logits_of(self._model(batch["input_ids"], **arguments))[0]
        return logits if self._keeps_rows else logits[batch["logits_indices"]]


class _LiveHooks(Hooks):
    """Hooks that compute: the first run collects the states of each attention, later ones read and write them."""

    def __init__(self, paths: dict[int, str], providers: tuple[str, ...]):
        super().__init__(interface="autodeploy_live")
        self.batch: dict[str, Tensor] = {}
        self.states: dict[str, dict[str, PagedState]] = {}
        self._paths, self._providers = paths, providers
        self._functions: dict[str, Callable[..., Tensor]] = {}

    def call_attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        sinks: Tensor | None,
        scale: float,
        causal: bool,
        sliding_window: int | None,
        softcap: float | None,
        position_bias: Tensor | None,
        indices: Tensor | None,
        index_block_size: int,
    ) -> Tensor:
        if position_bias is not None or indices is not None:
            raise NotLive("its attention has a position bias or chosen keys")
        facts = MaskFacts(causal=causal, sliding_window=sliding_window)
        if mask is not None:
            facts = getattr(mask, "facts", None) or _lost(mask)
        path = self._paths[id(module)].replace(".", "_")
        arguments: dict[str, Any] = dict.fromkeys(attention.parameters) | {
            "query": query.transpose(1, 2),
            "key": key.transpose(1, 2),
            "value": value.transpose(1, 2),
            "cu_seqlens": self.batch["cu_seqlens"],
            "sinks": sinks,
            "scale": scale,
            "causal": facts.causal,
            "sliding_window": facts.sliding_window,
            "chunk_size": facts.chunk_size,
            "softcap": softcap,
        }
        if path not in self._functions:
            return self._first_call(path, arguments)
        for parameter, spec in self.states[path].items():
            arguments[parameter] = self.batch[spec.name]
        group = self.states[path]["key_cache"].group
        arguments["seq_lens"] = self.batch["seq_lens"]
        arguments["page_table"] = self.batch[f"page_table_{group}"]
        arguments["slot_mapping"] = self.batch[f"slot_mapping_{group}"]
        return self._functions[path](**arguments)

    def call_mask(self, facts: MaskFacts) -> Tensor:
        """A stand-in that carries the facts; it must reach the attention as it is."""
        mask = torch.ones(1, 1, 1, 1, dtype=torch.bool)
        mask.facts = facts  # type: ignore[attr-defined]
        return mask

    def _first_call(self, path: str, arguments: dict[str, Any]) -> Tensor:
        assert attention.states is not None
        specs = attention.states(**arguments)
        self.states[path] = {
            name: PagedState(name=f"{path}_{name}", shape=spec.shape, dtype=spec.dtype, window=spec.window)
            for name, spec in specs.items()
            if isinstance(spec, PagedState)
        }
        self._functions[path] = self._function(arguments)
        result: Tensor = attention.reference(**arguments)
        return result

    def _function(self, arguments: dict[str, Any]) -> Callable[..., Tensor]:
        """The first kernel that supports these arguments, judged by empty states."""
        example = arguments | {
            "seq_lens": torch.tensor([1], dtype=torch.int32),
            "page_table": torch.tensor([[1]], dtype=torch.int32),
            "slot_mapping": torch.tensor([0]),
            "key_cache": arguments["key"].new_empty(2, 16, *arguments["key"].shape[2:]),
            "value_cache": arguments["value"].new_empty(2, 16, *arguments["value"].shape[2:]),
        }
        for provider in self._providers:
            kernel = cached_attention.kernels.get(provider)
            if kernel is not None and kernel.supports(**example) is None:
                return kernel.function
        return cached_attention.reference


def _lost(mask: Tensor) -> MaskFacts:
    raise NotLive(f"its mask reaches the attention as another tensor of shape {list(mask.shape)}")
