"""The CPU provider: C++ kernels, compiled where they run, for the ops that decoding spends its time in.

native.py      compiles and loads csrc/, and says why it cannot
linear.py moe.py         products with few rows, bound by memory bandwidth
quantized_linear.py quantized_moe.py quantized_embedding.py   weights of 8 or 4 bits, multiplied or looked up
norm.py rope.py mlp.py   token-wise ops, one call each
attention.py mla.py   attention over pages read in place
recurrence.py  convolutions, scans and linear recurrences over slot states
matrix_memory.py   delta rules and linear attention over slot states
token_shift.py   the token some places back
sampling.py    tokens chosen from logits
sequences.py   what these are given
tape.py torch_calls.py   a step as a few native calls, with the operators of torch between its kernels
batch_invariant.py   the same for rows that must not depend on other rows
"""

from autodeploy.kernels.cpu import (
    attention,
    batch_invariant,
    linear,
    matrix_memory,
    mla,
    mlp,
    moe,
    norm,
    quantized_embedding,
    quantized_linear,
    quantized_moe,
    recurrence,
    rope,
    sampling,
    token_shift,
)
from autodeploy.kernels.cpu.native import is_compiled, why_unavailable

PROVIDER = "cpu"

__all__ = [
    "PROVIDER",
    "attention",
    "batch_invariant",
    "is_compiled",
    "linear",
    "matrix_memory",
    "mla",
    "mlp",
    "moe",
    "norm",
    "quantized_embedding",
    "quantized_linear",
    "quantized_moe",
    "recurrence",
    "rope",
    "sampling",
    "token_shift",
    "why_unavailable",
]
