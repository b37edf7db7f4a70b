"""Providers: who implements ops besides the reference, whether they can run here, and in which order they are asked."""

from collections.abc import Callable
from typing import Any

import torch

from autodeploy.errors import ConfigError
from autodeploy.kernels import cpu, flashinfer, triton
from autodeploy.ops.op import REFERENCE, Kernel, Op

PROVIDERS: dict[str, tuple[str, ...]] = {"cpu": (cpu.PROVIDER,), "cuda": (triton.PROVIDER,)}
"""Device type -> providers of kernels for it, in order of preference; the reference comes last and is not listed."""

NAMED: dict[str, tuple[str, ...]] = {"cuda": (flashinfer.PROVIDER,)}
"""Providers that are asked only where `attn_backend` names them."""


def priority(device: torch.device) -> tuple[str, ...]:
    """Providers to ask for kernels on a device, in order.

    One that cannot run here refuses each op with the reason, or has no kernels; see `unavailable`.
    """
    names = PROVIDERS.get(device.type, ())
    if triton.PROVIDER in names:
        triton.load()
    return names


def invariant_priority(device: torch.device) -> tuple[str, ...]:
    """Providers to ask for batch-invariant kernels on a device, in order."""
    return (*priority(device), cpu.batch_invariant.PROVIDER) if device.type == "cpu" else priority(device)


def mixer_priority(device: torch.device, attn_backend: str) -> tuple[str, ...]:
    """Providers to ask for attention kernels: `auto` asks the device's, a provider's name that one first, `torch` none.

    Raises:
        ConfigError: an attention backend that has no kernels for this device, or is not installed.
    """
    if attn_backend == "auto":
        return priority(device)
    named = NAMED.get(device.type, ())
    if attn_backend in named:
        reason = flashinfer.why_unavailable()
        if reason is not None:
            raise ConfigError(f"attn_backend={attn_backend!r} cannot be used: {reason}, or take attn_backend='auto'")
        flashinfer.load()
        return (attn_backend, *priority(device))
    known = (*priority(device), *named, REFERENCE)
    if attn_backend not in known:
        raise ConfigError(
            f"attn_backend={attn_backend!r} is not available on {device.type}; choose one of auto, {', '.join(known)}"
        )
    return () if attn_backend == REFERENCE else (attn_backend,)


def kernel_for(op: Op, device: torch.device, **arguments: Any) -> Kernel | None:
    """The preferred kernel of an op that is called outside of graphs, for arguments like these; None: the reference."""
    kernels = (op.kernels.get(name) for name in priority(device))
    return next((k for k in kernels if k is not None and k.supports(**arguments) is None), None)


def is_prepared(device: torch.device) -> bool:
    """True when `prepare` has nothing left to compile."""
    return cpu.PROVIDER not in priority(device) or cpu.is_compiled()


def prepare(device: torch.device, progress: Callable[[str], None]) -> None:
    """Compile what providers compile on first use, and say so; say too who cannot be used, and why."""
    if not is_prepared(device):
        progress("compiling the CPU kernels (once per machine)")
    for name, reason in unavailable(device).items():
        progress(f"no {name} kernels, the reference functions run: {reason}")


def unavailable(device: torch.device) -> dict[str, str]:
    """Providers of a device that cannot run here, with the reason."""
    asked: dict[str, Callable[[], str | None]] = {
        cpu.PROVIDER: cpu.why_unavailable,
        triton.PROVIDER: triton.why_unavailable,
    }
    reasons = {name: asked[name]() for name in priority(device)}
    return {name: reason for name, reason in reasons.items() if reason is not None}
