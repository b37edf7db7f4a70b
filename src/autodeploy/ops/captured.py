"""Captured ops: what the capture hooks leave in a graph at Hugging Face's own interfaces, before canonicalisation.

They keep the interface's layout (`[1, heads, T, dim]`) and its mask as a graph value, and run as they are, so that a
CAPTURED graph can be checked against the model. `MatchAttention` turns them into the canonical `attention`; loops over
tokens are marked by `captured_run` and collected by `captured_stack`, and `RollLoops` makes recurrences of them.
"""

import itertools

import torch
from torch import Tensor, fx

from autodeploy.ops.attention import attention, visible_keys
from autodeploy.ops.op import op


def _mask_fake(
    cu_seqlens: Tensor, position_ids: Tensor, causal: bool, sliding_window: int | None, chunk_size: int | None
) -> Tensor:
    num_tokens = position_ids.shape[1]
    return position_ids.new_empty(1, 1, num_tokens, num_tokens, dtype=torch.bool)


@op(opaque=True, fake=_mask_fake)
def captured_mask(
    cu_seqlens: Tensor, position_ids: Tensor, causal: bool, sliding_window: int | None, chunk_size: int | None
) -> Tensor:
    """The mask these facts stand for, over packed sequences: bool `[1, 1, T, T]`, True where a query may look."""
    borders = cu_seqlens.tolist()
    blocks = [
        visible_keys(end - start, end - start, causal, sliding_window, chunk_size, 0, position_ids.device)
        for start, end in itertools.pairwise(borders)
    ]
    mask: Tensor = torch.block_diag(*blocks).bool()
    return mask[None, None]


def _captured_attention_fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor,
    sinks: Tensor | None,
    scale: float,
    causal: bool,
    sliding_window: int | None,
    softcap: float | None,
    bias: Tensor | None,
    indices: Tensor | None,
    block_size: int,
) -> Tensor:
    return value.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])


@op(opaque=True, fake=_captured_attention_fake)
def captured_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor,
    sinks: Tensor | None,
    scale: float,
    causal: bool,
    sliding_window: int | None,
    softcap: float | None,
    bias: Tensor | None,
    indices: Tensor | None,
    block_size: int,
) -> Tensor:
    """One call of the attention interface.

    Args:
        query: `[1, N, T, H]`. key: `[1, K, T, H]`. value: `[1, K, T, V]`.
        mask: `[1, 1 or N, T, T]`, bool or added to the scores; None when `causal` and `sliding_window` alone decide.
        sinks: `[N]`, or `[1, T, N]` where they depend on the token.
        bias: `[1, 1 or N, T, T]`, added to the scores, or None.
        indices: `[1, groups, T, k]`, blocks of `block_size` tokens that each query attends to, -1 for none; or None.
    Returns:
        `[1, T, N, V]`.
    """
    query, key, value = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    if mask is None and bias is None and indices is None:
        output: Tensor = attention.reference(
            query, key, value, cu_seqlens, sinks, scale, causal, sliding_window, None, softcap, None, None
        )
        return output
    if mask is None:
        mask = captured_mask.reference(cu_seqlens, query[..., 0, 0], causal, sliding_window, None)
    if indices is not None:
        chosen = _chosen(indices, block_size, key.shape[1]).repeat_interleave(query.shape[2] // indices.shape[1], 1)
        mask = mask & chosen if mask.dtype == torch.bool else mask.masked_fill(~chosen, float("-inf"))
    return _masked_attention(query, key, value, mask, sinks, scale, softcap, bias)


def _chosen(indices: Tensor, block_size: int, num_tokens: int) -> Tensor:
    """Blocks by number as a mask: bool `[1, groups, T, num_tokens]`."""
    blocks = -(-num_tokens // block_size)
    chosen = torch.zeros(*indices.shape[:-1], blocks + 1, dtype=torch.bool, device=indices.device)
    chosen.scatter_(-1, indices.long().masked_fill(indices < 0, blocks), True)
    return chosen[..., :blocks].repeat_interleave(block_size, -1)[..., :num_tokens]


def _masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    sinks: Tensor | None,
    scale: float,
    softcap: float | None,
    bias: Tensor | None,
) -> Tensor:
    groups = query.shape[2] // key.shape[2]
    key, value = key.repeat_interleave(groups, 2), value.repeat_interleave(groups, 2)
    scores = torch.einsum("bqnh,bknh->bnqk", query.float(), key.float()) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if bias is not None:
        scores = scores + bias
    scores = scores.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:
        per_token = sinks if sinks.dim() == 3 else sinks.reshape(1, 1, -1).expand(1, scores.shape[2], -1)
        weights = torch.softmax(torch.cat((scores, per_token.float().transpose(1, 2)[..., None]), dim=-1), dim=-1)
        weights = weights[..., :-1]
    else:
        weights = torch.softmax(scores, dim=-1)
    return torch.einsum("bnqk,bknv->bqnv", weights.to(value.dtype), value)


@op(fake=lambda x, shape: x.new_empty(shape, dtype=torch.float32))
def captured_state(x: Tensor, shape: list[int]) -> Tensor:
    """The state after the last token, `[1, ...]`, of a mixer that returns it: a model hands it to its cache.

    The mixer's cached twin keeps the state itself, so that nothing may read this one.
    """
    raise RuntimeError("a graph reads the final state of a token mixer; verify() refuses such a graph")


NUM_RUNS = 3
"""how many times the body of a loop over tokens is traced: the first, and two to compare with each other"""


def _run_fake(cu_seqlens: Tensor, run: int) -> None:
    return None


@op(fake=_run_fake)
def captured_run(cu_seqlens: Tensor, run: int) -> None:
    """A mark: here begins a run of a loop's body (-1: the loop ends). cu_seqlens: `[S+1]`, there to be traced."""
    return None


fx.node.has_side_effect(captured_run.overload)  # a mark has no users, and stays


def _stack_fake(parts: list[Tensor], dim: int, stacked: bool, num_tokens: int) -> Tensor:
    rank = parts[0].dim() + int(stacked)
    shape = list(parts[0].shape)
    if stacked:
        shape.insert(dim % rank, 1)
    shape[dim % rank] = shape[dim % rank] * num_tokens
    return parts[0].new_empty(shape)


@op(fake=_stack_fake)
def captured_stack(parts: list[Tensor], dim: int, stacked: bool, num_tokens: int) -> Tensor:
    """What a loop over tokens gave: `parts` of the traced runs stand for those of all `[T]` tokens.

    Args:
        parts: one tensor of each traced run.
        dim: where the tokens go.
        stacked: as a new dimension; otherwise concatenated along an existing one.
        num_tokens: T.
    """
    raise NotImplementedError("a loop over tokens runs once it is rolled into a recurrence")
