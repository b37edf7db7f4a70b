"""Recurrences over packed sequences: a function of equally long sequences and their states is run over a packed row.

A recurrent token mixer is written once, for a batch of sequences of one length: `recurrence(state [S, ...],
part [S, L, ...], ...) -> (output [S, L, ...], new state [S, ...])`. Sequences of equal length go through it together,
so that a decode step of many sequences is one call.
"""

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Recurrence = Callable[..., tuple[Tensor, Tensor]]


def over_sequences(
    recurrence: Recurrence, row: Sequence[Tensor | None], cu_seqlens: Tensor | None, shape: Sequence[int]
) -> Tensor:
    """Run a recurrence over whole sequences, each from a state of float32 zeros.

    Args:
        row: the mixer's per-token arguments, each `[1, T, ...]` or None.
        cu_seqlens: int `[S+1]`, where each sequence starts in the row; None when the row is one sequence.
        shape: shape of one sequence's state.
    Returns:
        The outputs, `[1, T, ...]`.
    """
    first = next(part for part in row if part is not None)
    borders = [0, first.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    state = torch.zeros(len(borders) - 1, *shape, dtype=torch.float32, device=first.device)
    return _run(recurrence, row, borders, state, torch.arange(len(borders) - 1, device=first.device))


def continue_sequences(
    recurrence: Recurrence,
    row: Sequence[Tensor | None],
    cu_seqlens: Tensor | None,
    state: Tensor,
    state_slots: Tensor,
) -> Tensor:
    """Run a recurrence over new tokens of sequences whose states are in slots; the states are updated in place.

    Args:
        row, cu_seqlens: the new tokens, as in `over_sequences`.
        state: `[slots, ...]`. state_slots: int `[S]`, each sequence's slot.
    """
    first = next(part for part in row if part is not None)
    borders = [0, first.shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    return _run(recurrence, row, borders, state, state_slots.long())


def _run(
    recurrence: Recurrence, row: Sequence[Tensor | None], borders: list[int], state: Tensor, slots: Tensor
) -> Tensor:
    by_length: dict[int, list[int]] = {}
    for sequence, (start, end) in enumerate(itertools.pairwise(borders)):
        if end > start:
            by_length.setdefault(end - start, []).append(sequence)
    output = None
    for length, sequences in by_length.items():
        parts = [part if part is None else _take(part, borders, sequences, length) for part in row]
        chosen = slots[sequences]
        result, after = recurrence(state.index_select(0, chosen), *parts)
        state.index_copy_(0, chosen, after.to(state.dtype))
        if output is None:
            output = result.new_empty(1, borders[-1], *result.shape[2:])
        _put(output, result, borders, sequences, length)
    assert output is not None, "a packed row holds at least one token"
    return output


def _is_contiguous(sequences: list[int], borders: list[int], length: int) -> bool:
    first, last = sequences[0], sequences[-1]
    return borders[last + 1] - borders[first] == length * len(sequences)


def _token_rows(borders: list[int], sequences: list[int], length: int, device: torch.device) -> Tensor:
    starts = torch.tensor([borders[sequence] for sequence in sequences], device=device)
    return starts[:, None] + torch.arange(length, device=device)


def _take(part: Tensor, borders: list[int], sequences: list[int], length: int) -> Tensor:
    """The tokens of some equally long sequences, `[S, L, ...]`."""
    if _is_contiguous(sequences, borders, length):
        start = borders[sequences[0]]
        return part[0, start : start + length * len(sequences)].reshape(len(sequences), length, *part.shape[2:])
    return part[0, _token_rows(borders, sequences, length, part.device)]


def _put(output: Tensor, result: Tensor, borders: list[int], sequences: list[int], length: int) -> None:
    if _is_contiguous(sequences, borders, length):
        start = borders[sequences[0]]
        output[0, start : start + length * len(sequences)] = result.flatten(0, 1)
    else:
        output[0, _token_rows(borders, sequences, length, output.device)] = result
