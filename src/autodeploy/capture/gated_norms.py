"""Norms that take a gate are recognised by their numbers, as `probe.py` recognises those that do not.

A leaf module of one one-dimensional weight whose forward takes a second tensor is run on random input beside every
variant of `gated_rms_norm` that its attributes allow: in float32 within rounding, in bfloat16 bit for bit. What a
mixer hands over may be float32 beside a gate in bfloat16: that is tried by itself.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import astuple, dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from autodeploy.capture.probe import materialised, small_floats
from autodeploy.ops.norm import gated_rms_norm


@dataclass(frozen=True)
class GatedNormFacts:
    """A gated norm's facts, as `ops.norm.gated_rms_norm` takes them."""

    eps: float
    activation: str
    groups: int
    gate_first: bool
    scale_in_float32: bool


@contextlib.contextmanager
def gated_norms_recognised(model: nn.Module) -> Iterator[int]:
    """While open, recognised gated norms of a model emit the canonical op. Yields how many there are."""
    facts: dict[object, tuple[GatedNormFacts, bool] | None] = {}
    with contextlib.ExitStack() as stack:
        found = 0
        for module in model.modules():
            key = _key(module)
            if key is None:
                continue
            if key not in facts:
                probed = probe_gated_norm(module)
                facts[key] = None if probed is None else (probed, takes_float32(module, probed))
            known = facts[key]
            if known is not None:
                found += 1
                stack.enter_context(_emitting(module, *known))
        yield found


def probe_gated_norm(module: nn.Module) -> GatedNormFacts | None:
    """The facts of a module that computes a gated RMSNorm, or None. Its parameters may be on any device."""
    (weight,) = module.parameters()
    width = weight.shape[0]
    real = materialised(module)
    for values in product(
        small_floats(module), ("silu", "sigmoid"), _groups(module, width), (True, False), (False, True)
    ):
        facts = GatedNormFacts(*values)
        if all(_same(real, width, facts, dtype, dtype) for dtype in (torch.float32, torch.bfloat16)):
            return facts
    return None


def takes_float32(module: nn.Module, facts: GatedNormFacts) -> bool:
    """Whether a module with these facts computes what the op does of float32 beside a gate and a weight in bfloat16."""
    (weight,) = module.parameters()
    return _same(materialised(module), weight.shape[0], facts, torch.float32, torch.bfloat16)


def _key(module: nn.Module) -> object:
    """Modules with equal keys compute the same norm; None for what cannot be one of two tensors."""
    parameters = list(module.parameters(recurse=False))
    is_leaf = not any(True for _ in module.children()) and not list(module.buffers())
    if not is_leaf or len(parameters) != 1 or parameters[0].dim() != 1:
        return None
    names = list(inspect.signature(type(module).forward).parameters.values())
    taken = [p for p in names if p.kind in (p.POSITIONAL_OR_KEYWORD, p.POSITIONAL_ONLY)]
    if len(taken) != 3 or len(names) != 3:
        return None
    scalars = {k: v for k, v in vars(module).items() if isinstance(v, bool | int | float | str) and k != "training"}
    return (type(module), parameters[0].shape, tuple(sorted(scalars.items())))


def _groups(module: nn.Module, width: int) -> list[int]:
    """How many parts the width may fall into: one, or what an attribute says as their number or their size."""
    numbers = [v for v in vars(module).values() if type(v) is int and 0 < v <= width and width % v == 0]
    return sorted({1, *numbers, *(width // number for number in numbers)})


def _same(module: nn.Module, width: int, facts: GatedNormFacts, x_dtype: torch.dtype, dtype: torch.dtype) -> bool:
    generator = torch.Generator().manual_seed(0)
    x, gate = (torch.randn(2, 5, width, generator=generator).to(of) for of in (x_dtype, dtype))
    module = module.to(dtype)
    (weight,) = module.parameters()
    expected = gated_rms_norm.reference(x, gate, weight, *astuple(facts))
    try:
        with torch.no_grad():
            result = module(x, gate)
    except Exception:
        return False
    if not isinstance(result, Tensor) or (result.shape, result.dtype) != (expected.shape, x_dtype):
        return False
    if x_dtype == torch.float32:
        return torch.allclose(result, expected, rtol=2e-6, atol=2e-6)
    return torch.equal(result, expected)


def _forward(module: nn.Module, facts: GatedNormFacts, takes_float32: bool) -> Callable[..., Any]:
    original = module.forward

    def forward(x: Tensor, gate: Tensor | None = None) -> Any:
        (weight,) = module.parameters(recurse=False)
        if gate is None or gate.shape != x.shape or gate.dtype != weight.dtype:
            return original(x, gate)
        if x.dtype != gate.dtype and not (takes_float32 and x.dtype == torch.float32):
            return original(x, gate)
        normed: Tensor = gated_rms_norm(x, gate, weight, *astuple(facts))
        return normed

    return forward


@contextlib.contextmanager
def _emitting(module: nn.Module, facts: GatedNormFacts, takes_float32: bool) -> Iterator[None]:
    before = vars(module).get("forward")
    module.forward = _forward(module, facts, takes_float32)
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before
