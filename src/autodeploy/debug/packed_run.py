"""One step by hand: a program and some sequences go in, all their logits come out, without a scheduler."""

import itertools

import torch
from torch import Tensor

from autodeploy.compile.program import Program
from autodeploy.ops.state import PagedState


def run_packed(program: Program, rows: list[Tensor], first: Tensor | None = None) -> Tensor:
    """Logits `[sum of lengths, V]`, float32 on the CPU, of sequences packed into one step over fresh states.

    Args:
        rows: token ids `[length]` of each sequence.
        first: leading tokens of the only sequence that an earlier step takes; the result covers the rest.
    """
    states = fresh_states(program, rows)
    if first is not None:
        program.run(packed_batch(program, [first], page_size=len(rows[0])), states)
    computed = 0 if first is None else len(first)
    return program.run(packed_batch(program, rows, computed), states).float().cpu()


def packed_batch(
    program: Program, rows: list[Tensor], computed: int = 0, page_size: int | None = None
) -> dict[str, Tensor]:
    """Batch inputs for sequences of which `computed` tokens are done; sequence s has page and slot s + 1."""
    page_size = page_size or max(len(row) for row in rows)
    lengths = [len(row) - computed for row in rows]
    positions = [torch.arange(computed, len(row)) for row in rows]
    pages = torch.arange(1, len(rows) + 1, dtype=torch.int32)
    slots = torch.cat([(s + 1) * page_size + position for s, position in enumerate(positions)])
    batch: dict[str, Tensor] = {
        "input_ids": torch.cat([row[computed:] for row in rows])[None],
        "position_ids": torch.cat(positions)[None],
        "cu_seqlens": torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32),
        "seq_lens": torch.tensor([len(row) for row in rows], dtype=torch.int32),
        "logits_indices": torch.arange(sum(lengths)),
        "state_slots": pages,
    }
    for spec in program.states:
        if isinstance(spec, PagedState):
            batch |= {f"page_table_{spec.group}": pages[:, None], f"slot_mapping_{spec.group}": slots}
    return {name: value.to(program.device) for name, value in batch.items()}


def fresh_states(program: Program, rows: list[Tensor]) -> dict[str, Tensor]:
    """Zeroed states for these sequences: one page as long as the longest and one slot each, and scratch."""
    count, page_size = len(rows) + 1, max(len(row) for row in rows)
    return {
        spec.name: torch.zeros(
            *((count, page_size) if isinstance(spec, PagedState) else (count,)),
            *spec.shape,
            dtype=spec.dtype,
            device=program.device,
        )
        for spec in program.states
    }
