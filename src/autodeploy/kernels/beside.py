"""Kernels beside graphs: of the ops that the runtime calls itself, or has called behind the logits of a graph."""

import torch

from autodeploy.kernels import flashinfer
from autodeploy.kernels.provider import kernel_for
from autodeploy.ops.op import Kernel
from autodeploy.ops.sampling import accept_drafts, choose_tokens


def kernels_beside(vocab_size: int, dtype: torch.dtype, device: torch.device) -> dict[str, Kernel]:
    """Kernels of the ops that the runtime calls beside a program's graphs, by op; it does without what is not there."""
    logits = torch.empty(1, vocab_size, dtype=dtype, device=device)  # a fake one would import half a compiler
    tokens = torch.empty(1, dtype=torch.int64, device=device)
    draws = dict.fromkeys(name for name in choose_tokens.parameters if name != "logits")
    found = {
        choose_tokens.name: kernel_for(choose_tokens, device, logits=logits, **draws),
        accept_drafts.name: kernel_for(accept_drafts, device, tokens=tokens, drafts=tokens, starts=tokens),
    }
    return {name: kernel for name, kernel in found.items() if kernel is not None}


def why_not_taken(attn_backend: str) -> dict[str, list[str]]:
    """By op, why the provider that is named has no kernel for it, though its package could do it; for the report."""
    if attn_backend != flashinfer.PROVIDER:
        return {}
    return {name: [f"{flashinfer.PROVIDER}: {reason}"] for name, reason in flashinfer.NOT_TAKEN.items()}
