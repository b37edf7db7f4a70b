"""The Triton provider: kernels for CUDA devices, compiled where they run, and tested by Triton's interpreter elsewhere.

launch.py      how a kernel is launched, tuned, refused, and written down for tests
arithmetic.py  what several kernels compute with
norm.py rope.py mlp.py   token-wise ops, one launch each
packed_weights.py   weights of 8 or 4 bits as tiles in registers, activations rounded
quantized_linear.py   products with such weights
float8.py scaled_mm.py fp8_linear.py   activations rounded to 8-bit floating point, products with such weights
float4.py nvfp4_linear.py   products with weights of 4-bit floating point
experts.py     products grouped by expert
moe.py quantized_moe.py fp8_moe.py nvfp4_moe.py   mixtures of experts made of them
paged.py       what kernels over pages share
attention.py mla.py sparse_attention.py   attention over pages read in place
rope_attention.py   rope and the writing of pages in one launch, then attention
sequences.py   what kernels over slot states share
causal_conv.py ssm.py recurrence.py   convolutions, state-space and other recurrences of channels
matrix_memory.py   delta rules and linear attention
mlstm.py token_shift.py   the matrix memory of an xLSTM; tokens some places back
sampling.py   tokens chosen from rows of logits

Ops without a kernel, whose references run on the device: `linear`, which is a library's product; `quantized_embedding`,
a lookup of a row for each token; `cached_keep_rows`, one indexed store; `cached_recurrence`, whose body is a text that
any model may bring, and which would have to become a kernel's source first.

Nothing of Triton is imported before `load`, so that a program for the CPU does not pay for it.
"""

import functools
import importlib
from importlib.metadata import PackageNotFoundError, version

import torch

from autodeploy import env

PROVIDER = "triton"

MODULES = (
    "attention",
    "causal_conv",
    "fp8_linear",
    "fp8_moe",
    "matrix_memory",
    "mla",
    "mlp",
    "mlstm",
    "moe",
    "norm",
    "nvfp4_linear",
    "nvfp4_moe",
    "quantized_linear",
    "quantized_moe",
    "recurrence",
    "rope",
    "rope_attention",
    "sampling",
    "sparse_attention",
    "ssm",
    "token_shift",
)
"""Modules that hold kernels."""

_OLDEST = (3, 6)


@functools.cache
def why_unavailable() -> str | None:
    """The reason that Triton kernels cannot be used here, or None."""
    try:
        found = version("triton")
    except PackageNotFoundError:
        return "the package triton is not installed; install autodeploy[cuda]"
    if tuple(int(part) for part in found.split(".")[:2]) < _OLDEST:
        return f"triton {found} is installed; the kernels need {'.'.join(map(str, _OLDEST))} or newer"
    if not (torch.cuda.is_available() or env.is_triton_interpreted()):
        return "torch finds no CUDA device"
    return None


@functools.cache
def load() -> None:
    """Register the kernels; none where they cannot be used."""
    if why_unavailable() is None:
        for name in MODULES:
            importlib.import_module(f"{__name__}.{name}")


__all__ = ["PROVIDER", "load", "why_unavailable"]
