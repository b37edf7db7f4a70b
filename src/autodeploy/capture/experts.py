"""Experts at Hugging Face's experts interface: a call of it becomes one `moe` node over stacked weights.

The interface says how a module keeps its weights (gate or none, biases, transposed); what the module's own gate
function computes is found by running it. A gate that no closed form equals stays in the graph as the model's own code,
between two `expert_linear`.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ExpertsInterface

from autodeploy.ops.mlp import ACTIVATIONS
from autodeploy.ops.moe import expert_gate, expert_linear, moe

INTERFACE_NAME = "autodeploy"

_SCALES = (1.0, 10.0, 1e3, 1e5)
"""Sizes of the values that gates are tried on: past any limit that they may have"""


@dataclass(frozen=True)
class GateFacts:
    """What stands between an expert's two products, as `ops.moe.moe` takes it, and how gate and up are laid out."""

    activation: str
    gated: bool
    limit: float | None = None
    up_offset: float = 0.0
    interleaved: bool = False

    def apply(self, hidden: Tensor) -> Tensor:
        if self.interleaved:
            hidden = deinterleaved(hidden, hidden.dim() - 1)
        return expert_gate(hidden, self.activation, self.gated, self.limit, self.up_offset)


@contextlib.contextmanager
def experts_hooked(model: nn.Module) -> Iterator[int]:
    """While open, every module of a model that goes through the interface emits canonical ops. Yields how many."""
    modules = [module for module in model.modules() if is_at_interface(module)]
    gates = {id(module): probe_gate(_own_gate(module), module) for module in modules}
    configs: dict[int, Any] = {id(module.config): module.config for module in modules}
    before = {key: config._experts_implementation for key, config in configs.items()}

    def experts(module: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return _emit(module, gates[id(module)], hidden_states, top_k_index, top_k_weights)

    ExpertsInterface.register(INTERFACE_NAME, experts)
    for config in configs.values():
        config._experts_implementation = INTERFACE_NAME
    try:
        yield len(modules)
    finally:
        for key, config in configs.items():
            config._experts_implementation = before[key]
        ExpertsInterface._global_mapping.pop(INTERFACE_NAME, None)


def is_at_interface(module: nn.Module) -> bool:
    """True for a module of a class that transformers' `use_experts_implementation` decorates."""
    facts = ("has_gate", "has_bias", "is_transposed")
    return all(isinstance(vars(module).get(fact), bool) for fact in facts) and hasattr(type(module), "_apply_gate")


def _has_norm(module: nn.Module) -> bool:
    """Whether a norm stands behind each expert; transformers 5.17 knows no such experts."""
    return bool(vars(module).get("has_post_expert_norm"))


def probe_gate(function: Callable[[Tensor], Tensor], module: nn.Module) -> GateFacts | None:
    """The facts of a gate `[..., 2·I] -> [..., I]` or an activation `[..., I] -> [..., I]`; None if it is neither.

    Args:
        function: is called with real tensors on the CPU, in float32 and bfloat16.
        module: whose floating-point attributes may be the gate's limit.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.cat([torch.randn(8, 16, generator=generator) * scale for scale in _SCALES])
    try:
        with torch.no_grad():
            results = {dtype: function(x.to(dtype)) for dtype in (torch.float32, torch.bfloat16)}
    except Exception:
        return None  # it needs its own weights, or another width: no closed form then
    if not all(isinstance(result, Tensor) for result in results.values()):
        return None
    numbers = [float(v) for v in vars(module).values() if isinstance(v, int | float) and not isinstance(v, bool)]
    attributes = {number for number in numbers if 0 < number < _SCALES[-1]}
    for facts in _candidates(results[torch.float32].shape == x.shape, sorted(attributes)):
        if all(_equal(facts.apply(x.to(dtype)), result) for dtype, result in results.items()):
            return facts
    return None


def _candidates(is_activation: bool, limits: list[float]) -> Iterator[GateFacts]:
    if is_activation:
        yield from (GateFacts(name, False) for name in ACTIVATIONS)
        return
    choices = itertools.product((False, True), (None, *limits), (0.0, 1.0), ACTIVATIONS)
    yield from (GateFacts(name, True, limit, offset, interleaved) for interleaved, limit, offset, name in choices)


def _equal(mine: Tensor, theirs: Tensor) -> bool:
    if mine.shape != theirs.shape or mine.dtype != theirs.dtype:
        return False
    return torch.allclose(mine, theirs, rtol=2e-6, atol=0) if mine.dtype == torch.float32 else torch.equal(mine, theirs)


def _own_gate(module: nn.Module) -> Callable[[Tensor], Tensor]:
    function: Any = module._apply_gate if module.has_gate else module.act_fn
    return function  # type: ignore[no-any-return]


def _emit(module: Any, facts: GateFacts | None, x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
    """The canonical ops that one call of the interface stands for."""
    gate_up: Tensor = module.gate_up_proj if module.has_gate else module.up_proj
    down: Tensor = module.down_proj
    up_bias = None
    if module.has_bias:
        up_bias = module.gate_up_proj_bias if module.has_gate else module.up_proj_bias
    down_bias = module.down_proj_bias if module.has_bias else None
    if module.is_transposed:
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    inner = x.to(gate_up.dtype)
    if facts is None or _has_norm(module):
        return _emit_parts(module, inner, indices, weights, (gate_up, up_bias), (down, down_bias)).to(x.dtype)
    if facts.interleaved:
        gate_up = deinterleaved(gate_up, 1)
        up_bias = None if up_bias is None else deinterleaved(up_bias, 1)
    routed = (inner, indices, weights, gate_up, down, up_bias, down_bias)
    result: Tensor = moe(*routed, facts.activation, facts.gated, facts.limit, facts.up_offset)
    return result.to(x.dtype)


def _emit_parts(
    module: Any,
    x: Tensor,
    indices: Tensor,
    weights: Tensor,
    up: tuple[Tensor, Tensor | None],
    down: tuple[Tensor, Tensor | None],
) -> Tensor:
    """Two products with the module's own code between and after them, and the weighted sum."""
    hidden = expert_linear(x.unsqueeze(1), indices, *up)
    hidden = _own_gate(module)(hidden.flatten(0, 1))
    result = expert_linear(hidden.unflatten(0, indices.shape), indices, *down)
    if _has_norm(module):
        result = module.post_expert_norm(result.flatten(0, 1)).unflatten(0, indices.shape)
    summed: Tensor = (result * weights.unsqueeze(-1)).sum(1)
    return summed


def deinterleaved(weight: Tensor, dim: int) -> Tensor:
    """(a0, b0, a1, b1, ...) along a dimension becomes (a0, a1, ..., b0, b1, ...)."""
    before, after = weight.shape[:dim], weight.shape[dim + 1 :]
    apart = weight.reshape(*before, weight.shape[dim] // 2, 2, *after).transpose(dim, dim + 1)
    return apart.reshape(*before, weight.shape[dim], *after)
