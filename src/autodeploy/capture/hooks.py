"""Capture hooks: what a model calls at Hugging Face's attention, mask and cache interfaces becomes captured ops.

`Hooks.installed(model)` is a context: it registers the hooks, points the model at them, and puts everything back.
Models that bypass an interface are left as they are; canonicalisation then matches their ATen graph, or refuses it.
"""

import contextlib
import inspect
import itertools
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.masking_utils import AttentionMaskInterface

from autodeploy.errors import CaptureError
from autodeploy.graph.model_graph import ATTENTION, CONVOLUTION, INDEXER, RECURRENCE
from autodeploy.ops.attention import MaskFacts
from autodeploy.ops.captured import captured_attention, captured_mask

INTERFACE_NAME = "autodeploy"


@dataclass
class Hooks:
    """The state of one capture: the packed row's inputs while tracing, and what the model did at its interfaces."""

    cu_seqlens: Tensor | None = None
    position_ids: Tensor | None = None
    num_tokens: int | torch.SymInt = 0
    attention_calls: int = 0
    state_writes: Counter[str] = field(default_factory=Counter)
    """by kind, how often the model wrote to its Hugging Face cache"""
    active_modules: list[str] = field(default_factory=list)
    """paths of the modules whose forward is running, outermost first"""
    most_chosen: int = 0
    """most tokens that a query attends to by choice, where an indexer chooses for it"""
    interface: str = INTERFACE_NAME
    """the name under which the hooks are registered"""

    @contextlib.contextmanager
    def installed(self, model: nn.Module) -> Iterator[None]:
        """Register the hooks and point the model at them; undone on leaving."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(_module_paths(model, self.active_modules))
            known = next((part for part in model.modules() if isinstance(part, PreTrainedModel)), None)
            if known is not None and known._can_set_attn_implementation():
                stack.enter_context(_attention_implementation(known))
                self.install(known)
                stack.callback(self._unregister)
            yield

    def install(self, model: PreTrainedModel) -> None:
        """Register the attention and mask hooks and point the model at them, for good."""
        for interface, function in ((AttentionInterface, self.attention), (AttentionMaskInterface, self.mask)):
            interface.register(self.interface, function)
        for config in _configs(model):
            config._attn_implementation = self.interface

    def _unregister(self) -> None:
        for interface in (AttentionInterface, AttentionMaskInterface):
            interface._global_mapping.pop(self.interface, None)

    def attention(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        *,
        scaling: float | None = None,
        is_causal: bool | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        s_aux: Tensor | None = None,
        sinks: Tensor | None = None,
        position_bias: Tensor | None = None,
        indices: Tensor | None = None,
        block_indices: Tensor | None = None,
        **others: Any,
    ) -> tuple[Tensor, None]:
        """Stands in for an attention function: one captured op, or a refusal by name of what it cannot express."""
        if others.get("head_mask") is not None:
            raise CaptureError(
                f"attention in {type(module).__name__} uses 'head_mask', which no canonical op expresses yet;"
                " see docs/adding-an-op.md"
            )
        block_size = 1
        if block_indices is not None:
            block_size = int(module.config.index_block_size)  # type: ignore[union-attr, arg-type]
        indices = indices[:, None] if indices is not None else block_indices
        if indices is not None:
            self.most_chosen = max(self.most_chosen, _at_most(indices.shape[-1]) * block_size)
        self.attention_calls += 1
        causal = is_causal if is_causal is not None else bool(getattr(module, "is_causal", True))
        output = self.call_attention(
            module,
            query,
            key,
            value,
            attention_mask,
            _sinks(s_aux if s_aux is not None else sinks),
            float(scaling if scaling is not None else query.shape[-1] ** -0.5),
            causal,
            sliding_window or None,
            softcap or None,
            position_bias,
            indices,
            block_size,
        )
        return output, None

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
        """What an attention call becomes, see `captured_attention`. query: `[1, N, T, H]`; result: `[1, T, N, V]`."""
        assert self.cu_seqlens is not None, "hooks run only while a packed row is traced"
        facts = (scale, causal, sliding_window, softcap, position_bias, indices, index_block_size)
        result: Tensor = captured_attention(query, key, value, mask, self.cu_seqlens, sinks, *facts)
        return result

    def mask(
        self,
        batch_size: int,
        q_length: int,
        kv_length: int,
        q_offset: int = 0,
        kv_offset: int = 0,
        mask_function: Callable[..., Any] | None = None,
        **_: Any,
    ) -> Tensor:
        """Stands in for a mask function: the facts as one captured op instead of mask arithmetic.

        A function that is none of the known ones is run over all queries and keys, as transformers would: what it does
        is then recognised by its values, or refused, where the mask is used.
        """
        try:
            facts = mask_facts(mask_function)
        except CaptureError:
            if mask_function is None or q_offset or kv_offset:
                raise
            return _whole_mask(mask_function, batch_size, q_length, kv_length)
        return self.call_mask(facts)

    def call_mask(self, facts: MaskFacts) -> Tensor:
        """What a mask becomes."""
        assert self.cu_seqlens is not None and self.position_ids is not None
        mask: Tensor = captured_mask(
            self.cu_seqlens, self.position_ids, facts.causal, facts.sliding_window, facts.chunk_size
        )
        return mask


def _whole_mask(function: Callable[..., Any], batch_size: int, q_length: int, kv_length: int) -> Tensor:
    """A mask function's values, bool `[batch, 1, queries, keys]`; such functions take indices that broadcast."""
    batch, queries, keys = torch.arange(batch_size), torch.arange(q_length), torch.arange(kv_length)
    visible: Tensor = function(batch[:, None, None, None], batch.new_zeros(1), queries[:, None], keys[None])
    return visible.expand(batch_size, 1, q_length, kv_length)


def _at_most(size: int | torch.SymInt) -> int:
    """What a size such as `min(k, T)` is for a very long row."""
    if isinstance(size, int):
        return size
    return int(size.node.expr.subs(dict.fromkeys(size.node.expr.free_symbols, 2**40)))


def _sinks(sinks: Tensor | None) -> Tensor | None:
    """Sinks in the layout of the op, from one number per head or a column of scores `[1, N, T, 1]`."""
    if sinks is None or sinks.dim() == 1:
        return sinks
    if sinks.dim() == 4 and sinks.shape[0] == 1 and sinks.shape[3] == 1:
        return sinks[..., 0].transpose(1, 2)
    raise CaptureError(f"attention sinks of shape {list(sinks.shape)}; expected [heads] or [1, heads, T, 1]")


def mask_facts(function: Callable[..., Any] | None) -> MaskFacts:
    """Read the closures that `transformers.masking_utils` builds.

    Raises:
        CaptureError: a mask function that is none of the known ones; never assumed to be causal.
    """
    name = getattr(function, "__qualname__", "")
    if function is None or name == "bidirectional_mask_function":
        return MaskFacts()
    if name == "causal_mask_function":
        return MaskFacts(causal=True)
    cells = dict(zip(function.__code__.co_freevars, [c.cell_contents for c in function.__closure__ or ()], strict=True))
    if name.startswith("and_masks"):
        return _all_of([mask_facts(part) for part in cells["mask_functions"]])
    if name.startswith("sliding_window_overlay"):
        return MaskFacts(sliding_window=int(cells["sliding_window"]))
    if name.startswith("chunked_overlay"):
        return MaskFacts(chunk_size=int(cells["chunk_size"]))
    if name.startswith("packed_sequence_mask_function"):
        return MaskFacts()
    if name.startswith("remap_positions_for_packed_sequence"):
        return mask_facts(cells["mask_function"])
    raise CaptureError(
        f"the model builds its attention mask with {name or function!r}, which is none of causal, sliding window,"
        " chunked or their intersections; it is refused rather than assumed causal"
    )


def _all_of(parts: list[MaskFacts]) -> MaskFacts:
    windows = [part.sliding_window for part in parts if part.sliding_window is not None]
    chunks = {part.chunk_size for part in parts if part.chunk_size is not None}
    if len(chunks) > 1:
        raise CaptureError(f"one attention mask combines chunks of different sizes {sorted(chunks)}")
    return MaskFacts(
        causal=any(part.causal for part in parts),
        sliding_window=min(windows, default=None),
        chunk_size=next(iter(chunks), None),
    )


class _MarkerLayer:
    """One layer of a marker cache, for models that reach past the cache to its layers."""

    is_initialized = False
    supports_early_init = False

    def __init__(self, hooks: Hooks):
        self._hooks = hooks

    def update_index(self, index_states: Tensor, *_: Any, **__: Any) -> Tensor:
        self._hooks.state_writes[INDEXER] += 1
        return index_states


class MarkerCache(Cache):
    """A Hugging Face cache that remembers nothing and counts what it is asked to remember, by kind.

    The cache protocol is where a model says that a layer has state; the count is what canonicalisation and cache
    insertion must account for, also for models that bypass the attention interface. Nothing is ever there already, so
    that a model takes its path for a whole sequence.
    """

    is_compileable = False

    def __init__(self, hooks: Hooks, num_layers: int):
        # Not a model's own class, which `marker_cache` may mix in.
        Cache.__init__(self, layers=[_MarkerLayer(hooks) for _ in range(num_layers)])  # type: ignore[misc]
        self._hooks, self._num_layers = hooks, num_layers

    def __len__(self) -> int:
        return self._num_layers

    @property
    def is_sliding(self) -> list[bool]:
        return [False] * self._num_layers

    @property
    def is_linear(self) -> list[bool]:
        return [False] * self._num_layers

    @property
    def is_dummy(self) -> list[bool]:
        return [False] * self._num_layers

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self._hooks.state_writes[ATTENTION] += 1
        return key_states, value_states

    def update_indexer(self, indexer_key_states: Tensor, *_: Any, **__: Any) -> Tensor:
        self._hooks.state_writes[INDEXER] += 1
        return indexer_key_states

    def update_conv_state(self, conv_states: Tensor, *_: Any, **__: Any) -> Tensor:
        self._hooks.state_writes[CONVOLUTION] += 1
        return conv_states

    def update_recurrent_state(self, recurrent_states: Tensor, *_: Any, **__: Any) -> Tensor:
        self._hooks.state_writes[RECURRENCE] += 1
        return recurrent_states

    def set_linear_cache(self, *_: Any, **__: Any) -> None:
        self._hooks.state_writes[RECURRENCE] += 1

    def get_conv_state(self, *_: Any, **__: Any) -> None:
        return None

    def get_recurrent_state(self, *_: Any, **__: Any) -> None:
        return None

    def get_linear_cache(self, *_: Any, **__: Any) -> Tensor:
        """A state of zeros, of any shape: continued token by token, it is a loop over tokens, which can be followed."""
        return torch.zeros(())

    def is_recording_past(self, *_: Any, **__: Any) -> bool:
        return False

    def has_previous_state(self, *_: Any, **__: Any) -> bool:
        return False

    def get_seq_length(self, *_: Any, **__: Any) -> int:
        return 0

    def get_query_offset(self, *_: Any, **__: Any) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, *_: Any, **__: Any) -> tuple[int, int]:
        return query_length, 0

    def get_max_cache_shape(self, *_: Any, **__: Any) -> int:
        return -1

    def get_max_length(self, *_: Any, **__: Any) -> int:
        return -1


def marker_cache(model: PreTrainedModel, hooks: Hooks) -> MarkerCache:
    """A marker for a model; where its own code defines the cache class it insists on, the marker is one of that too."""
    layers = int(getattr(model.config.get_text_config(), "num_hidden_layers", 0))
    modules = {cls.__module__ for module in model.modules() for cls in type(module).__mro__}
    own = {
        value
        for name in modules
        for value in vars(sys.modules[name]).values()
        if isinstance(value, type) and issubclass(value, Cache) and value.__module__ in modules
    }
    kind: type[MarkerCache] = type("OwnMarkerCache", (MarkerCache, *own), {}) if len(own) == 1 else MarkerCache
    return kind(hooks, layers)


def model_arguments(model: nn.Module, hooks: Hooks, position_ids: Tensor) -> dict[str, Any]:
    """Keyword arguments with which a model runs one packed row: positions, and a cache that remembers nothing."""
    parameters = inspect.signature(model.forward).parameters
    arguments: dict[str, Any] = {}
    if "position_ids" in parameters:
        arguments["position_ids"] = position_ids
    cache = _cache_parameter(parameters)
    if isinstance(model, PreTrainedModel) and cache is not None:
        arguments |= {cache: marker_cache(model, hooks), "use_cache": True}
    elif "use_cache" in parameters:
        arguments["use_cache"] = False  # it keeps state in its own way; without any it runs whole sequences
    return arguments


def _cache_parameter(parameters: Mapping[str, inspect.Parameter]) -> str | None:
    """The parameter through which a model takes a Hugging Face cache; None for one with a cache class of its own."""
    if "past_key_values" in parameters:
        return "past_key_values"
    parameter = parameters.get("cache_params")  # what models without any attention call it
    if parameter is not None and Cache in (parameter.annotation, *get_args(parameter.annotation)):
        return "cache_params"
    return None


def logits_of(output: Any) -> Tensor:
    """The logits `[1, T, V]` among what a model returns.

    Raises:
        CaptureError: there are none.
    """
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if logits is None and isinstance(output, tuple | list):
        logits = output[0]
    if not isinstance(logits, Tensor):
        raise CaptureError(
            f"the model returns {type(output).__name__}; expected logits [1, T, V], an object with .logits, or a"
            " tuple that starts with them"
        )
    return logits


def _configs(model: PreTrainedModel) -> list[Any]:
    """The distinct configs of a model and the models within it."""
    return list({id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}.values())


@contextlib.contextmanager
def _attention_implementation(model: PreTrainedModel) -> Iterator[None]:
    before = [(config, config._attn_implementation) for config in _configs(model)]
    try:
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation


@contextlib.contextmanager
def _module_paths(model: nn.Module, active: list[str]) -> Iterator[None]:
    """Keep `active` up to date with the modules whose forward is running; an exception leaves it as it was then."""

    def enter(path: str) -> Callable[..., None]:
        return lambda *_: active.append(path)

    handles = []
    for path, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(enter(f"{path or '(top)'} ({type(module).__name__})")))
        handles.append(module.register_forward_hook(lambda *_: active.pop() and None))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def packed_row(lengths: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Example inputs for sequences of these lengths: token ids `[1, T]`, position ids `[1, T]`, `cu_seqlens [S+1]`."""
    positions = torch.cat([torch.arange(length) for length in lengths])
    borders = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    return torch.zeros(1, sum(lengths), dtype=torch.int64), positions[None], borders
