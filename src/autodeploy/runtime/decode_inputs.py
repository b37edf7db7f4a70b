"""Inputs of decode steps: positions and tokens go in, arrays that are changed in place from step to step come out.

While the same sequences decode, most of a step's inputs are what they were, or one more. Nothing is carried on from the
step before but the memory and what follows from the slots alone, so that it does not matter what came in between.
"""

from collections.abc import Iterable, Mapping

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autodeploy.ops.batch_inputs import PAGE_TABLE, SLOT_MAPPING
from autodeploy.runtime.request import Sequence

Array = NDArray[np.integer]


def decode_tokens(scheduled: Mapping[Sequence, int]) -> tuple[list[int], list[int]] | None:
    """Positions and token ids where every sequence computes one token, its last; None for any other step.

    For a token that is being sampled, the id is -1 minus its row among those.
    """
    positions, token_ids = [], []
    for sequence, count in scheduled.items():
        position, known, row = sequence.num_computed_tokens, sequence.token_ids, sequence.pending_row
        if count != 1 or position != len(known) - (row is None):
            return None
        positions.append(position)
        token_ids.append(known[position] if row is None else -1 - row)
    return positions, token_ids


class DecodeInputs:
    """One step's inputs where each of the sequences in `slots` has one token.

    Attributes:
        slots: of the sequences, in the order of the row.
        arrays: values by name, of the dtypes declared in `ops/batch_inputs.py`.
        tensors: the same memory.
    """

    def __init__(self, names: Iterable[str], page_tables: Mapping[str, NDArray[np.int32]], slots: list[int]) -> None:
        num_seqs = len(slots)
        self.slots = slots
        self._rows = np.array(slots, dtype=np.int64)
        fixed: dict[str, Array] = {
            "input_ids": np.zeros((1, num_seqs), dtype=np.int64),
            "position_ids": np.zeros((1, num_seqs), dtype=np.int64),
            "cu_seqlens": np.arange(num_seqs + 1, dtype=np.int32),
            "seq_lens": np.zeros(num_seqs, dtype=np.int32),
            "logits_indices": np.arange(num_seqs, dtype=np.int64),
            "state_slots": np.array(slots, dtype=np.int32),
        }
        self.arrays: dict[str, Array] = {}
        self._tables: dict[str, NDArray[np.int32]] = {}
        self._slot_mappings: list[tuple[Array, NDArray[np.int32]]] = []
        for name in names:
            if name.startswith(PAGE_TABLE):
                self.arrays[name] = np.zeros((num_seqs, 0), dtype=np.int32)
                self._tables[name] = page_tables[name.removeprefix(PAGE_TABLE)]
            elif name.startswith(SLOT_MAPPING):
                array = self.arrays[name] = np.zeros(num_seqs, dtype=np.int64)
                self._slot_mappings.append((array, page_tables[name.removeprefix(SLOT_MAPPING)]))
            else:
                self.arrays[name] = fixed[name]
        self.tensors: dict[str, Tensor] = {name: torch.from_numpy(array) for name, array in self.arrays.items()}
        self._positions, self._token_ids = fixed["position_ids"][0], fixed["input_ids"][0]
        self._lengths = fixed["seq_lens"]

    def update(self, positions: list[int], token_ids: list[int], page_size: int) -> None:
        """Make them those of the step that computes these tokens at these positions."""
        self._positions[:] = positions
        self._token_ids[:] = token_ids
        self._lengths[:] = self._positions
        self._lengths += 1
        pages = self._positions // page_size
        for array, table in self._slot_mappings:  # in place, as each array that is made costs more than the numbers
            array[:] = table[self._rows, pages]
            array -= pages
            array *= page_size
            array += self._positions
        width = max(positions) // page_size + 1
        for name, table in self._tables.items():
            array = self.arrays[name]
            if array.shape[1] == width:
                array[:] = table[self._rows, :width]
            else:
                self.arrays[name] = np.ascontiguousarray(table[self._rows, :width])
                self.tensors[name] = torch.from_numpy(self.arrays[name])
