"""Batch inputs: the names, shapes and dtypes of everything a program reads besides weights and states.

One step runs one packed row of tokens. T = tokens in the row, S = sequences in the batch, R = rows of logits wanted,
P = page-table width. Sequence s owns the row's tokens `cu_seqlens[s] : cu_seqlens[s + 1]`; together with what its
states already hold, its context is `seq_lens[s]` tokens long after this step. Prefill, chunked prefill, decode and
verification differ in these numbers only.

Names ending in `{group}` exist once per state group (see `ops/state.py`): `page_table_full`, `slot_mapping_window_512`.
"""

from dataclasses import dataclass

import torch

PAGE_TABLE = "page_table_"
SLOT_MAPPING = "slot_mapping_"
"""What the names of inputs that exist once per state group begin with."""
HIDDEN_STATES = "hidden_states"
"""One more input of a draft head's graph, `[1, T, H]` in the program's dtype; who drafts gives it, not the batch."""


@dataclass(frozen=True)
class BatchInput:
    """One batch input. dims: symbolic sizes, by the letters above; an int is a fixed size."""

    dtype: torch.dtype
    dims: tuple[str | int, ...]
    meaning: str


BATCH_INPUTS: dict[str, BatchInput] = {
    "input_ids": BatchInput(torch.int64, (1, "T"), "token ids of the packed row"),
    "position_ids": BatchInput(torch.int64, (1, "T"), "position of each token in its own sequence, from 0"),
    "cu_seqlens": BatchInput(torch.int32, ("S+1",), "where each sequence's tokens start in the row; first 0, last T"),
    "seq_lens": BatchInput(torch.int32, ("S",), "context length of each sequence after this step, in tokens"),
    "logits_indices": BatchInput(torch.int64, ("R",), "rows of the packed row whose logits are wanted"),
    "state_slots": BatchInput(torch.int32, ("S",), "slot of each sequence in the slot states; slot 0 is scratch"),
    "page_table_{group}": BatchInput(
        torch.int32, ("S", "P"), "pages of each sequence in order; page 0 is scratch and stands for freed or unused"
    ),
    "slot_mapping_{group}": BatchInput(
        torch.int64, ("T",), "where each token's entry is written: page * page_size + offset within the page"
    ),
}


def is_by_sequence(name: str) -> bool:
    """Whether a concrete input has a row for each sequence."""
    declared = lookup(name)
    return declared is not None and declared.dims[0] == "S"


def lookup(name: str) -> BatchInput | None:
    """The declaration of a concrete input name such as `page_table_full`; None when it is no batch input."""
    if name in BATCH_INPUTS:
        return BATCH_INPUTS[name]
    for prefix in (PAGE_TABLE, SLOT_MAPPING):
        if name.startswith(prefix) and len(name) > len(prefix):
            return BATCH_INPUTS[prefix + "{group}"]
    return None
