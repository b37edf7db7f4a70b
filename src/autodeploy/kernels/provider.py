"""Providers: who implements ops besides the reference, whether they can run here, and in which order they are asked."""

import torch

from autodeploy.errors import ConfigError
from autodeploy.ops.op import REFERENCE

ATTENTION_BACKENDS = ("auto", REFERENCE)
"""Values of `attn_backend` that this version has kernels for."""


def priority(device: torch.device, attn_backend: str) -> tuple[str, ...]:
    """Providers to ask for kernels on a device, in order; the reference comes last and is not listed.

    Raises:
        ConfigError: an attention backend this version has no kernels for.
    """
    if attn_backend not in ATTENTION_BACKENDS:
        raise ConfigError(
            f"attn_backend={attn_backend!r} is not available on {device.type}; choose one of"
            f" {', '.join(ATTENTION_BACKENDS)}"
        )
    return ()
