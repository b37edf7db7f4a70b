"""Canonical operations: their meaning in pure torch, nothing else.

op.py            Op and the op table
state.py         what a cached op remembers between steps
batch_inputs.py  what a step is told besides weights and states
attention.py     softmax attention, whole and cached
rope_attention.py  the same, with queries and keys that are turned first
mla.py           attention over one latent per token
sparse_attention.py  attention to the tokens an indexer chooses
packed.py        recurrences over packed sequences
causal_conv.py   short causal convolutions
ssm.py           selective state-space recurrences
delta_rule.py    the delta rule, plain and gated
generalized_delta_rule.py  the same with keys of their own for reading and writing
wkv.py           a softmax over earlier tokens per channel, faded by distance
captured.py      what the capture hooks emit, before canonicalisation
linear_attention.py  linear_recurrence.py   a memory, or a value per channel, that fades
mlstm.py         the matrix memory of an xLSTM
recurrence.py    any loop over tokens, given as text, whole and cached
token_shift.py   the token some places back, whole and cached
keep_rows.py     a value of every token, kept for a reader beside the graph
norm.py rope.py linear.py mlp.py moe.py   token-wise operations
quantized_linear.py quantized_moe.py       products with weights of 8 or 4 bits
quantized_embedding.py       rows of such weights, looked up
fp8_linear.py fp8_moe.py       the same with 8-bit floating point
nvfp4_linear.py nvfp4_moe.py   the same with 4-bit floating point
sampling.py      tokens chosen from rows of logits, beside the graph
"""

from autodeploy.ops.attention import attention, cached_attention
from autodeploy.ops.captured import captured_attention, captured_mask
from autodeploy.ops.causal_conv import cached_causal_conv, causal_conv
from autodeploy.ops.delta_rule import cached_delta_rule, delta_rule
from autodeploy.ops.fp8_linear import fp8_linear
from autodeploy.ops.fp8_moe import fp8_moe
from autodeploy.ops.generalized_delta_rule import generalized_delta_rule
from autodeploy.ops.keep_rows import cached_keep_rows, keep_rows
from autodeploy.ops.linear import linear
from autodeploy.ops.linear_attention import linear_attention
from autodeploy.ops.linear_recurrence import linear_recurrence
from autodeploy.ops.mla import cached_mla, mla
from autodeploy.ops.mlp import gated_activation
from autodeploy.ops.mlstm import mlstm
from autodeploy.ops.moe import expert_linear, moe
from autodeploy.ops.norm import add_rms_norm, gated_rms_norm, layer_norm, rms_norm
from autodeploy.ops.nvfp4_linear import nvfp4_linear
from autodeploy.ops.nvfp4_moe import nvfp4_moe
from autodeploy.ops.op import OPS, Kernel, Op, find_op, op
from autodeploy.ops.quantized_embedding import quantized_embedding
from autodeploy.ops.quantized_linear import quantized_linear
from autodeploy.ops.quantized_moe import quantized_moe
from autodeploy.ops.recurrence import recurrence
from autodeploy.ops.rope import rope
from autodeploy.ops.rope_attention import cached_rope_attention, rope_attention
from autodeploy.ops.sampling import accept_drafts, choose_tokens
from autodeploy.ops.sparse_attention import cached_sparse_attention, sparse_attention
from autodeploy.ops.ssm import cached_selective_scan, cached_ssd, selective_scan, ssd
from autodeploy.ops.token_shift import token_shift
from autodeploy.ops.wkv import wkv

__all__ = [
    "OPS",
    "Kernel",
    "Op",
    "accept_drafts",
    "add_rms_norm",
    "attention",
    "cached_attention",
    "cached_causal_conv",
    "cached_delta_rule",
    "cached_keep_rows",
    "cached_mla",
    "cached_rope_attention",
    "cached_selective_scan",
    "cached_sparse_attention",
    "cached_ssd",
    "captured_attention",
    "captured_mask",
    "causal_conv",
    "choose_tokens",
    "delta_rule",
    "expert_linear",
    "find_op",
    "fp8_linear",
    "fp8_moe",
    "gated_activation",
    "gated_rms_norm",
    "generalized_delta_rule",
    "keep_rows",
    "layer_norm",
    "linear",
    "linear_attention",
    "linear_recurrence",
    "mla",
    "mlstm",
    "moe",
    "nvfp4_linear",
    "nvfp4_moe",
    "op",
    "quantized_embedding",
    "quantized_linear",
    "quantized_moe",
    "recurrence",
    "rms_norm",
    "rope",
    "rope_attention",
    "selective_scan",
    "sparse_attention",
    "ssd",
    "token_shift",
    "wkv",
]
