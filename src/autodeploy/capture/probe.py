"""Recognise norms and rotary functions by their numbers: run the model's own code, compare with closed forms.

No name, pattern or per-model table is involved: a module that computes an RMSNorm is one, however it is written. The
comparison is made in float32 and, exactly, in bfloat16, so that the order of rounding is recognised too. What matches
nothing is left as it is.
"""

import contextlib
import copy
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from autodeploy.ops.norm import rms_norm
from autodeploy.ops.rope import rope

ROTARY_FUNCTION = "apply_rotary_pos_emb"
"""The name Hugging Face modeling files give the function that rotates query and key."""


@dataclass(frozen=True)
class NormFacts:
    """An RMSNorm's facts, as `ops.norm.rms_norm` takes them."""

    eps: float
    weight_offset: float
    scale_in_float32: bool


@contextlib.contextmanager
def probed(model: nn.Module) -> Iterator[int]:
    """While open, recognised norms and rotary functions of a model emit canonical ops. Yields how many norms."""
    facts: dict[object, NormFacts | None] = {}
    norms = 0
    with contextlib.ExitStack() as stack:
        for module in model.modules():
            key = _norm_key(module)
            if key is None:
                continue
            if key not in facts:
                facts[key] = probe_norm(module)
            found = facts[key]
            if found is not None:
                norms += 1
                stack.enter_context(forward_replaced(module, _norm_forward(module, found)))
        for namespace in {id(vars(m)): vars(m) for m in modeling_modules(model)}.values():
            function = namespace.get(ROTARY_FUNCTION)
            if function is not None and probe_rotary(function):
                stack.enter_context(replaced(namespace, ROTARY_FUNCTION, _rotary(function)))
        yield norms


def probe_norm(module: nn.Module) -> NormFacts | None:
    """The facts of a module that computes an RMSNorm, or None. The module's parameters may be on any device."""
    weight = next(iter(module.parameters()), None)
    size = weight.shape[0] if weight is not None else 64
    real = materialised(module)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(3, 5, size, generator=generator) * scale for scale in (1.0, 1e-3)]
    for eps, offset, in_float32 in product(small_floats(module), (0.0, 1.0), (False, True)):
        if weight is None and (offset or in_float32):
            continue
        facts = NormFacts(eps, offset, in_float32)
        if all(_same(real, facts, x, torch.float32) for x in inputs) and all(
            _same(real, facts, x, torch.bfloat16) for x in inputs
        ):
            return facts
    return None


def probe_rotary(function: Callable[..., Any]) -> bool:
    """True when `function(query, key, cos, sin)` is the half-split rotation of `ops.rope`."""
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(1, 4, 6, 16, generator=generator), torch.randn(1, 2, 6, 16, generator=generator)
    angle = torch.randn(1, 6, 8, generator=generator).repeat(1, 1, 2)
    for dtype in (torch.float32, torch.bfloat16):
        q, k, cos, sin = (tensor.to(dtype) for tensor in (query, key, angle.cos(), angle.sin()))
        try:
            result = function(q, k, cos, sin)
        except Exception:
            return False
        expected = rope.reference(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
        if not (isinstance(result, tuple) and len(result) == 2):
            return False
        if not all(torch.equal(r.transpose(1, 2), e) for r, e in zip(result, expected, strict=True)):
            return False
    return True


def _norm_key(module: nn.Module) -> object:
    """Modules with equal keys compute the same norm; None for what cannot be a norm of one tensor."""
    if isinstance(module, nn.LayerNorm) or any(True for _ in module.children()):
        return None
    parameters = list(module.parameters(recurse=False))
    signature = inspect.signature(type(module).forward)
    required = [p for p in signature.parameters.values() if p.default is p.empty and p.kind == p.POSITIONAL_OR_KEYWORD]
    if len(required) != 2 or len(parameters) > 1 or any(p.dim() != 1 for p in parameters) or list(module.buffers()):
        return None
    if not parameters and not small_floats(module):
        return None
    scalars = {k: v for k, v in vars(module).items() if isinstance(v, bool | int | float | str) and k != "training"}
    return (type(module), tuple(p.shape for p in parameters), tuple(sorted(scalars.items())))


def small_floats(module: nn.Module) -> list[float]:
    """Values among the module's attributes that may be its epsilon."""
    values = [v for v in vars(module).values() if isinstance(v, float) and 0 <= v < 1e-2]
    return sorted(set(values)) or ([torch.finfo(torch.float32).eps] if isinstance(module, nn.RMSNorm) else [])


def materialised(module: nn.Module) -> nn.Module:
    """A copy with random float32 parameters on the CPU."""
    generator = torch.Generator().manual_seed(1)
    parameters = {
        name: nn.Parameter(torch.randn(parameter.shape, generator=generator), requires_grad=False)
        for name, parameter in module.named_parameters(recurse=False)
    }
    memo = {id(p): parameters[name] for name, p in module.named_parameters(recurse=False)}
    copied = copy.deepcopy(module, memo)
    vars(copied).pop("forward", None)  # one that stands in for the module's own has the module, not the copy, in hand
    return copied


def _same(module: nn.Module, facts: NormFacts, x: Tensor, dtype: torch.dtype) -> bool:
    module, x = module.to(dtype), x.to(dtype)
    weight = next(iter(module.parameters()), None)
    expected = rms_norm.reference(x, weight, facts.eps, facts.weight_offset, facts.scale_in_float32)
    try:
        with torch.no_grad():
            result = module(x)
    except Exception:
        return False
    if not isinstance(result, Tensor) or result.shape != expected.shape or result.dtype != expected.dtype:
        return False
    if dtype == torch.float32:
        return torch.allclose(result, expected, rtol=2e-6, atol=2e-6)
    return torch.equal(result, expected)


def _norm_forward(module: nn.Module, facts: NormFacts) -> Callable[..., Any]:
    original = module.forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        if any(value is not None for value in (*args, *kwargs.values())):
            return original(x, *args, **kwargs)  # such as a gate: more than what was recognised
        weight = next(iter(module.parameters(recurse=False)), None)
        normed: Tensor = rms_norm(x, weight, facts.eps, facts.weight_offset, facts.scale_in_float32)
        return normed

    return forward


def _rotary(original: Callable[..., Any]) -> Callable[..., Any]:
    def rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or kwargs.get("unsqueeze_dim", 1) != 1 or cos.dim() != 3 or cos.shape[-1] != query.shape[-1]:
            return original(query, key, cos, sin, *args, **kwargs)
        rotated_query, rotated_key = rope(query.transpose(1, 2), key.transpose(1, 2), cos, sin)
        return rotated_query.transpose(1, 2), rotated_key.transpose(1, 2)

    return rotate


def modeling_modules(model: nn.Module) -> list[Any]:
    """The Python modules that define a model's classes."""
    names = {cls.__module__ for module in model.modules() for cls in type(module).__mro__}
    return [sys.modules[name] for name in sorted(names) if name in sys.modules]


@contextlib.contextmanager
def forward_replaced(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """A module with another forward; undone on leaving."""
    module.forward = function
    try:
        yield
    finally:
        del module.forward


@contextlib.contextmanager
def replaced(namespace: dict[str, Any], name: str, value: object) -> Iterator[None]:
    """While open, a name in a namespace means something else."""
    before = namespace[name]
    namespace[name] = value
    try:
        yield
    finally:
        namespace[name] = before
