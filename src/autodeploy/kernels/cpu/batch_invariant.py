"""Kernels that give a row the same bits in every batch: alone or in a crowd, in one chunk or several.

They are the other CPU kernels, called so that the order of sums never depends on what else a step computes: products
row by row, attention over a few new tokens at a time, everything else one token after the other. What another kernel of
the provider promises by itself (`batch_invariant=True` where it is registered) needs none here.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from autodeploy.kernels.cpu.linear import native_linear
from autodeploy.kernels.cpu.native import MIN_WEIGHTS_FOR_THREADS, num_threads, pointer
from autodeploy.ops.attention import cached_attention
from autodeploy.ops.causal_conv import cached_causal_conv
from autodeploy.ops.delta_rule import cached_delta_rule
from autodeploy.ops.linear import linear
from autodeploy.ops.moe import moe
from autodeploy.ops.op import Op
from autodeploy.ops.quantized_linear import quantized_linear
from autodeploy.ops.quantized_moe import quantized_moe
from autodeploy.ops.ssm import cached_selective_scan, cached_ssd

PROVIDER = "cpu_invariant"
BASE = "cpu"

FEW_TOKENS = 16
"""New tokens of a sequence up to which each attends by itself; `FEW` in csrc/attention.cpp."""


def _base_supports(op: Op, **arguments: Any) -> str | None:
    return op.kernels[BASE].supports(**arguments)


@linear.kernel(PROVIDER, functools.partial(_base_supports, linear), batch_invariant=True)
def linear_row_by_row(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`linear` without blocks. A row alone would be summed in another order, and goes beside itself."""
    num_outputs, num_inputs = weight.shape
    weight = weight.contiguous()
    rows = x.reshape(-1, num_inputs).contiguous()
    rows = rows.expand(2, -1).contiguous() if len(rows) == 1 else rows
    bias = None if bias is None else bias.contiguous()
    out = x.new_empty(len(rows), num_outputs)
    native_linear[x.dtype](
        rows.data_ptr(),
        weight.data_ptr(),
        pointer(bias),
        out.data_ptr(),
        len(rows),
        num_inputs,
        num_outputs,
        None,
        num_threads(num_outputs * num_inputs, MIN_WEIGHTS_FOR_THREADS),
    )
    return out[: x.numel() // num_inputs].view(*x.shape[:-1], num_outputs)


def _attention_supports(**arguments: Any) -> str | None:
    if not arguments["causal"]:
        return "tokens that see later ones see another number of them in every chunk"
    return _base_supports(cached_attention, **arguments)


@cached_attention.kernel(PROVIDER, _attention_supports, batch_invariant=True)
@functools.wraps(cached_attention.reference)
def attention_in_short_pieces(*args: Any, **kwargs: Any) -> Tensor:
    """`cached_attention` with a long chunk as several sequences of few tokens that share their pages."""
    arguments = cached_attention.arguments(args, kwargs)
    kernel = cached_attention.kernels[BASE].function
    num_tokens, num_sequences = arguments["query"].shape[1], arguments["page_table"].shape[0]
    if num_tokens - num_sequences >= FEW_TOKENS:
        arguments |= _cut(arguments["cu_seqlens"], arguments["seq_lens"], arguments["page_table"])
    result: Tensor = kernel(**arguments)
    return result


def _cut(cu_seqlens: Tensor, seq_lens: Tensor, page_table: Tensor) -> dict[str, Tensor]:
    """The same tokens as sequences of at most `FEW_TOKENS` new ones."""
    starts, counts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long(), seq_lens.long()
    parts = (counts + FEW_TOKENS - 1) // FEW_TOKENS
    owners = torch.repeat_interleave(torch.arange(len(counts)), parts)
    first = torch.cumsum(parts, 0) - parts
    ends = torch.minimum((torch.arange(len(owners)) - first[owners] + 1) * FEW_TOKENS, counts[owners])
    return {
        "cu_seqlens": torch.cat((cu_seqlens[:1].long(), starts[owners] + ends)).int(),
        "seq_lens": (lengths[owners] - counts[owners] + ends).int(),
        "page_table": page_table[owners],
    }


def _token_by_token(op: Op, names: tuple[str, ...], dim: int) -> None:
    """Register for `op` its kernel of `BASE`, called for one token after the other.

    Args:
        names: parameters with an entry for each token, along `dim`; so has the result.
    """

    @functools.wraps(op.reference)
    def kernel(*args: Any, **kwargs: Any) -> Tensor:
        arguments = op.arguments(args, kwargs)
        function: Callable[..., Tensor] = op.kernels[BASE].function
        num_tokens = arguments[names[0]].shape[dim]
        if num_tokens <= 1:
            return function(**arguments)
        each = []
        for token, slot in enumerate(_slots(arguments, num_tokens)):
            cut = {n: arguments[n].narrow(dim, token, 1) for n in names if arguments[n] is not None}
            each.append(function(**arguments | cut | slot))
        return torch.cat(each, dim)

    op.kernel(PROVIDER, functools.partial(_base_supports, op), batch_invariant=True)(kernel)


def _slots(arguments: dict[str, Any], num_tokens: int) -> list[dict[str, Tensor]]:
    """For each token what a step of it alone is told: boundaries and slot, where the op remembers something."""
    slots: Tensor | None = arguments.get("state_slots")
    if slots is None:
        return [{}] * num_tokens
    borders: Tensor | None = arguments["cu_seqlens"]
    alone = torch.tensor([0, 1], dtype=torch.int32)
    owners = slots
    if len(slots) != num_tokens:  # else every sequence brings one, and nothing has to be read
        counts = torch.tensor([num_tokens]) if borders is None else borders.diff().long()
        owners = torch.repeat_interleave(slots, counts)
    return [{"cu_seqlens": alone, "state_slots": owners[token : token + 1]} for token in range(num_tokens)]


@quantized_linear.kernel(PROVIDER, functools.partial(_base_supports, quantized_linear), batch_invariant=True)
def quantized_linear_row_by_row(
    x: Tensor, weight: Tensor, scales: Tensor, offsets: Tensor | None, bias: Tensor | None, num_outputs: int
) -> Tensor:
    """`quantized_linear` of one row after the other."""
    kernel = quantized_linear.kernels[BASE].function
    rows = x.reshape(-1, x.shape[-1])
    if not len(rows):
        return x.new_empty(*x.shape[:-1], num_outputs)
    results = [kernel(rows[at : at + 1], weight, scales, offsets, bias, num_outputs) for at in range(len(rows))]
    return torch.cat(results).view(*x.shape[:-1], num_outputs)


_token_by_token(moe, ("x", "indices", "weights"), 0)
_token_by_token(quantized_moe, ("x", "indices", "weights"), 0)
_token_by_token(cached_causal_conv, ("x",), 1)
_token_by_token(cached_ssd, ("x", "dt", "B", "C"), 1)
_token_by_token(cached_selective_scan, ("x", "dt", "B", "C", "z"), 1)
_token_by_token(cached_delta_rule, ("query", "key", "value", "beta", "decay"), 1)
