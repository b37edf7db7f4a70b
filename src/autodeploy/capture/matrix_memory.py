"""Gated matrix memories behind modules: a module without weights that computes `mlstm` becomes that op.

A candidate takes query, key, value and two gates, heads first. It is run on random input beside the op, in float32 and
in bfloat16; its epsilon, far below any rounding of ordinary values, is measured where two tokens cancel each other.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from autodeploy.capture.probe import forward_replaced
from autodeploy.ops.mlstm import mlstm

ARGUMENTS = ("query", "key", "value", "igate", "fgate")
STATE = ("c_initial", "n_initial", "m_initial")
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2}


@contextlib.contextmanager
def memories_recognised(model: nn.Module) -> Iterator[None]:
    """While open, modules of a model that are a gated matrix memory emit `mlstm`."""
    with contextlib.ExitStack() as stack:
        for module in model.modules():
            is_candidate = set(ARGUMENTS) <= inspect.signature(type(module).forward).parameters.keys()
            if is_candidate and not any(True for _ in (*module.parameters(), *module.buffers(), *module.children())):
                facts = probe_memory(module)
                if facts is not None:
                    stack.enter_context(forward_replaced(module, _forward(module, facts)))
        yield


@dataclass(frozen=True)
class MemoryFacts:
    """eps: added to the normaliser. gives_state: the module returns a pair, its output and the state after it."""

    eps: float
    gives_state: bool


def probe_memory(module: nn.Module) -> MemoryFacts | None:
    """The facts of a module that computes `mlstm`, or None."""
    try:
        facts = _measured(module)
        exact = all(_agrees(module, facts.eps, length, torch.float32) for length in (3, 17, 70))
    except Exception:  # it takes other shapes, or needs what a memory does not
        return None
    if not exact:
        return None
    with contextlib.suppress(RuntimeError):  # chunks of some do not run below float32; then only steps are compared
        if not _agrees(module, facts.eps, 17, torch.bfloat16):
            return None
    return facts if _agrees(module, facts.eps, 1, torch.bfloat16) else None


def _call(module: nn.Module, *values: Tensor) -> tuple[Tensor, bool]:
    with torch.no_grad():
        result = module(**dict(zip(ARGUMENTS, values, strict=True)))
    return (result[0], True) if isinstance(result, tuple) else (result, False)


def _measured(module: nn.Module) -> MemoryFacts:
    """Two tokens of equal weight e⁴⁰ whose keys are opposite: the normaliser is 0, and only epsilon divides."""
    query, key = torch.ones(1, 1, 2, 1), torch.tensor([1.0, -1.0]).reshape(1, 1, 2, 1)
    value, gate = torch.tensor([3.0, 1.0]).reshape(1, 1, 2, 1), torch.full((1, 1, 2), 40.0)
    output, gives_state = _call(module, query, key, value, gate, gate)
    eps = float(2.0 / output[0, 0, 1, 0])
    return MemoryFacts(float(f"{eps:.3g}") if eps > 1e-12 else 0.0, gives_state)


def _agrees(module: nn.Module, eps: float, length: int, dtype: torch.dtype) -> bool:
    generator = torch.Generator().manual_seed(length)
    query, key, value = (torch.randn(1, 2, length, size, generator=generator).to(dtype) for size in (4, 4, 6))
    gates = [3 * torch.randn(1, 2, length, generator=generator).to(dtype) for _ in range(2)]
    (result, _), expected = _call(module, query, key, value, *gates), _emit(eps, query, key, value, *gates)
    if result.shape != expected.shape:
        return False
    distance = (result.float() - expected.float()).abs().max()
    return bool(distance <= TOLERANCE[dtype] * expected.float().abs().max())


def _emit(eps: float, query: Tensor, key: Tensor, value: Tensor, input_gate: Tensor, forget_gate: Tensor) -> Tensor:
    parts = (part.transpose(1, 2) for part in (query, key, value, input_gate, forget_gate))
    output: Tensor = mlstm(*parts, query.shape[-1] ** -0.5, eps, None)
    return output.transpose(1, 2)


def _forward(module: nn.Module, facts: MemoryFacts) -> Callable[..., Any]:
    original = module.forward

    def forward(query: Tensor, key: Tensor, value: Tensor, igate: Tensor, fgate: Tensor, **others: Any) -> Any:
        if any(others.get(name) is not None for name in STATE):
            return original(query=query, key=key, value=value, igate=igate, fgate=fgate, **others)
        output = _emit(facts.eps, query, key, value, igate, fgate)
        return (output, None) if facts.gives_state else output  # the state is in the cached twin's hands

    return forward
