"""Steps by hand: a program or state specs and some sequences go in; batches, states and logits come out.

No scheduler takes part: which tokens a step takes is said outright, as spans of the sequences.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autodeploy.compile.program import Program
from autodeploy.ops.state import PagedState, StateSpec


@dataclass(frozen=True)
class Span:
    """Tokens `start:end` of one sequence, by its index."""

    sequence: int
    start: int
    end: int


Step = list[Span]


def run_packed(program: Program, rows: list[Tensor], first: Tensor | None = None) -> Tensor:
    """Logits `[sum of lengths, V]`, float32 on the CPU, of sequences packed into one step over fresh states.

    Args:
        rows: token ids `[length]` of each sequence.
        first: leading tokens of the only sequence that an earlier step takes; the result covers the rest.
    """
    states = fresh_states(program.states, rows, program.device)
    computed = 0 if first is None else len(first)
    if first is not None:
        program.run(step_batch(program.states, rows, [Span(0, 0, computed)], program.device), states)
    spans = [Span(index, computed, len(row)) for index, row in enumerate(rows)]
    return program.run(step_batch(program.states, rows, spans, program.device), states).float().cpu()


def step_batch(
    states: Sequence[StateSpec],
    rows: list[Tensor],
    step: Step,
    device: torch.device,
    page_size: int | None = None,
) -> dict[str, Tensor]:
    """Batch inputs of a step that takes these spans, logits wanted for each of its tokens.

    Sequence s has slot s + 1 and as many consecutive pages as the longest sequence needs.

    Args:
        states: the specs whose page tables are wanted.
        page_size: tokens per page; default: one page holds the longest sequence.
    """
    page_size = page_size or max(map(len, rows))
    width = _pages_per_sequence(rows, page_size)
    first_pages = [1 + span.sequence * width for span in step]
    pages = torch.tensor([list(range(first, first + width)) for first in first_pages], dtype=torch.int32)
    positions = [torch.arange(span.start, span.end) for span in step]
    slots = [first * page_size + position for first, position in zip(first_pages, positions, strict=True)]
    lengths = [span.end - span.start for span in step]
    batch: dict[str, Tensor] = {
        "input_ids": torch.cat([rows[span.sequence][span.start : span.end] for span in step])[None],
        "position_ids": torch.cat(positions)[None],
        "cu_seqlens": torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32),
        "seq_lens": torch.tensor([span.end for span in step], dtype=torch.int32),
        "logits_indices": torch.arange(sum(lengths)),
        "state_slots": torch.tensor([span.sequence + 1 for span in step], dtype=torch.int32),
    }
    for spec in states:
        if isinstance(spec, PagedState):
            batch |= {f"page_table_{spec.group}": pages, f"slot_mapping_{spec.group}": torch.cat(slots)}
    return {name: value.to(device) for name, value in batch.items()}


def fresh_states(
    states: Sequence[StateSpec], rows: list[Tensor], device: torch.device, page_size: int | None = None
) -> dict[str, Tensor]:
    """Zeroed states for these sequences: the pages and the slot that `step_batch` gives each, and scratch."""
    page_size = page_size or max(map(len, rows))
    pages = 1 + len(rows) * _pages_per_sequence(rows, page_size)
    return {
        spec.name: torch.zeros(
            *((pages, page_size) if isinstance(spec, PagedState) else (1 + len(rows),)),
            *spec.shape,
            dtype=spec.dtype,
            device=device,
        )
        for spec in states
    }


def _pages_per_sequence(rows: list[Tensor], page_size: int) -> int:
    return -(-max(map(len, rows)) // page_size)
