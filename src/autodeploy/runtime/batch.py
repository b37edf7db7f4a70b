"""Batches: scheduled sequences go in, the batch inputs of one packed row come out, as tensors on the device."""

import math
from collections.abc import Iterable, Mapping
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from autodeploy.errors import UnsupportedModelError
from autodeploy.ops.batch_inputs import PAGE_TABLE, SLOT_MAPPING, lookup
from autodeploy.runtime.decode_inputs import DecodeInputs, decode_tokens
from autodeploy.runtime.request import Sequence

IntArray = NDArray[np.int64]

_PLANNED_FROM = ("cu_seqlens", "seq_lens")
"""What, with page tables, kernels plan steps from."""


@dataclass(frozen=True)
class Batch:
    """One step's inputs by name, and the sequences whose next tokens it decides.

    The first rows of the logits belong to the sequences in `sampled`: for each, one row behind its last token and one
    behind each of its drafts. After those come the rows of `prompt_rows`, whose logits tell the log-probabilities of a
    prompt's tokens: (sequence, position of the first row, number of rows). A program is never asked for zero rows:
    where nothing is wanted, one row of logits is computed all the same.

    Inputs hold until the `build` after the next. On CUDA the copies may still be under way: sampled tokens must have
    been read by then.
    """

    inputs: dict[str, Tensor]
    sampled: list[Sequence]
    num_tokens: int
    num_sampled_rows: int
    prompt_rows: SequenceOf[tuple[Sequence, int, int]] = ()
    on_host: dict[str, Tensor] = field(default_factory=dict)
    """those of the inputs that say where sequences are and how long, on the host"""

    @property
    def has_drafts(self) -> bool:
        return self.num_sampled_rows != len(self.sampled)


class BatchBuilder:
    """Builds the inputs that a program reads.

    Args:
        names: batch inputs wanted, see `ops/batch_inputs.py`.
        page_tables: live page tables `[num_slots, pages]` by group name, read at every build.
        max_num_seqs, max_num_batched_tokens: most sequences and tokens of one step; sizes of the buffers.
    Raises:
        UnsupportedModelError: a name that is no batch input, or of a state group the program does not have.
    """

    def __init__(
        self,
        names: Iterable[str],
        *,
        page_tables: Mapping[str, NDArray[np.int32]],
        page_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        device: torch.device,
    ) -> None:
        self._page_tables = page_tables
        self._page_size = page_size
        self._device = device
        self._names = tuple(names)
        self._planned_from = [name for name in self._names if name in _PLANNED_FROM or name.startswith(PAGE_TABLE)]
        self._decoding = [DecodeInputs((), page_tables, []), DecodeInputs((), page_tables, [])]
        """of the last build of a decode step and of the one before"""
        self._dtypes: dict[str, np.dtype[np.integer]] = {}
        self._pinned: list[dict[str, Tensor]] = [{}, {}]
        """for this build and the next: one's copies are made while the other's buffers are filled"""
        self._arange: IntArray = np.arange(max(max_num_batched_tokens, max_num_seqs) + 1, dtype=np.int64)
        num_rows = max_num_seqs + max_num_batched_tokens
        lengths = {"T": max_num_batched_tokens, "S": max_num_seqs, "S+1": max_num_seqs + 1, "R": num_rows, 1: 1}
        for name in self._names:
            declared = lookup(name)
            group = name.removeprefix(PAGE_TABLE).removeprefix(SLOT_MAPPING)
            if declared is None or (group != name and group not in page_tables):
                raise UnsupportedModelError(
                    f"the program reads {name!r}, which this runtime cannot provide; the program's groups of paged "
                    f"states are: {', '.join(page_tables) or 'none'}"
                )
            lengths["P"] = page_tables[group].shape[1] if group != name else 0
            self._dtypes[name] = np.dtype(np.int32 if declared.dtype == torch.int32 else np.int64)
            if device.type == "cuda":  # pinned once, so that the copies of a step do not wait for the device
                size = math.prod(lengths[dim] for dim in declared.dims)
                for buffers in self._pinned:
                    buffers[name] = torch.zeros(size, dtype=declared.dtype, pin_memory=True)

    def build(self, scheduled: Mapping[Sequence, int], latest_R: Tensor | None = None) -> Batch:
        """The inputs for computing `scheduled[sequence]` more tokens of each sequence; at least one sequence.

        A sequence with drafts computes all its tokens and all its drafts.

        Args:
            latest_R: the tokens that `Sequence.pending_row` means, on the device.
        """
        self._pinned.reverse()
        tokens = decode_tokens(scheduled)
        if tokens is None:
            return self._general(scheduled, latest_R)
        decode = self._decode_inputs([sequence.slot for sequence in scheduled])
        decode.update(*tokens, self._page_size)
        return self._batch(
            decode.arrays,
            list(scheduled),
            len(scheduled),
            len(scheduled),
            placed=decode.tensors if self._device.type == "cpu" else None,
            latest_R=latest_R,
        )

    def _decode_inputs(self, slots: list[int]) -> DecodeInputs:
        """Those for these slots that the build before the last one used, or new ones."""
        self._decoding.reverse()
        if self._decoding[0].slots != slots:
            self._decoding[0] = DecodeInputs(self._names, self._page_tables, slots)
        return self._decoding[0]

    def _general(self, scheduled: Mapping[Sequence, int], latest_R: Tensor | None) -> Batch:
        num_seqs = len(scheduled)
        counts: IntArray = np.fromiter(scheduled.values(), np.int64, num_seqs)
        starts: IntArray = np.array([sequence.num_computed_tokens for sequence in scheduled], dtype=np.int64)
        lengths: IntArray = np.array([sequence.num_tokens for sequence in scheduled], dtype=np.int64)
        slots: IntArray = np.array([sequence.slot for sequence in scheduled], dtype=np.int64)
        ends = starts + counts
        offsets: IntArray = np.zeros(num_seqs + 1, dtype=np.int64)
        np.cumsum(counts, out=offsets[1:])
        num_tokens = int(offsets[-1])
        token_slots = np.repeat(slots, counts)
        positions = self._arange[:num_tokens] + np.repeat(starts - offsets[:-1], counts)
        is_complete = ends >= lengths
        rows = offsets[1:][is_complete] - 1
        rows = self._with_drafts(rows, num_drafts=(ends - lengths)[is_complete])
        num_sampled_rows = len(rows)
        prompt_rows = _prompt_rows(scheduled)
        if prompt_rows:
            firsts = dict(zip(scheduled, offsets.tolist(), strict=False))
            wanted = [self._arange[firsts[of] : firsts[of] + count] for of, _, count in prompt_rows]
            rows = np.concatenate([rows, *wanted])
        values: dict[str, NDArray[np.integer]] = {
            "input_ids": _token_ids(scheduled).reshape(1, -1),
            "position_ids": positions.reshape(1, -1),
            "cu_seqlens": offsets,
            "seq_lens": ends,
            "logits_indices": rows if len(rows) else self._arange[:1],
            "state_slots": slots,
        }
        pages, entries = positions // self._page_size, positions % self._page_size
        num_pages = -(-int(ends.max()) // self._page_size)
        for group, table in self._page_tables.items():
            values[PAGE_TABLE + group] = table[slots, :num_pages]
            values[SLOT_MAPPING + group] = table[token_slots, pages] * np.int64(self._page_size) + entries
        sampled = [sequence for sequence, complete in zip(scheduled, is_complete.tolist(), strict=True) if complete]
        return self._batch(values, sampled, num_tokens, num_sampled_rows, prompt_rows, latest_R=latest_R)

    def _batch(
        self,
        values: Mapping[str, NDArray[np.integer]],
        sampled: list[Sequence],
        num_tokens: int,
        num_sampled_rows: int,
        prompt_rows: SequenceOf[tuple[Sequence, int, int]] = (),
        *,
        placed: Mapping[str, Tensor] | None = None,
        latest_R: Tensor | None = None,
    ) -> Batch:
        """The batch with these values on the device.

        Args:
            placed: the same as tensors, where they are on the device already.
        """
        inputs = dict(placed or {name: self._place(name, values[name]) for name in self._names})
        on_host = {
            name: inputs[name] if inputs[name].is_cpu else torch.from_numpy(values[name]) for name in self._planned_from
        }
        if latest_R is not None and "input_ids" in inputs and values["input_ids"].min() < 0:
            inputs["input_ids"] = _filled_in(inputs["input_ids"], latest_R)
        return Batch(inputs, sampled, num_tokens, num_sampled_rows, prompt_rows, on_host)

    def _with_drafts(self, rows: IntArray, num_drafts: IntArray) -> IntArray:
        """Each row after as many rows before it as it has drafts."""
        if not num_drafts.any():
            return rows
        return np.concatenate([self._arange[row - more : row + 1] for row, more in zip(rows, num_drafts, strict=True)])

    def _place(self, name: str, value: NDArray[np.integer]) -> Tensor:
        """The value as a contiguous tensor on the device, through the name's pinned buffer when there is a copy."""
        if self._device.type == "cpu":
            return torch.from_numpy(np.ascontiguousarray(value, dtype=self._dtypes[name]))
        buffer = self._pinned[0][name][: value.size]
        buffer.numpy()[:] = value.reshape(-1)
        return buffer.view(value.shape).to(self._device, non_blocking=True)


def _filled_in(ids: Tensor, latest_R: Tensor) -> Tensor:
    """Token ids, with -1 minus a row replaced by the token chosen in that row."""
    return torch.where(ids < 0, latest_R[(-1 - ids).clamp_(min=0)], ids)


def _prompt_rows(scheduled: Mapping[Sequence, int]) -> list[tuple[Sequence, int, int]]:
    """Which of the scheduled tokens predict a token of a prompt whose log-probabilities are asked for."""
    rows = []
    for sequence, count in scheduled.items():
        if sequence.params.prompt_logprobs is not None and sequence.wants_prompt_logprobs:
            first = sequence.num_computed_tokens
            num_rows = min(first + count, sequence.num_prompt_tokens - 1) - first
            if num_rows > 0:
                rows.append((sequence, first, num_rows))
    return rows


def _token_ids(scheduled: Mapping[Sequence, int]) -> IntArray:
    """The tokens of the row; for one that is being sampled, -1 minus its row among those."""
    token_ids: list[int] = []
    for sequence, count in scheduled.items():
        start = sequence.num_computed_tokens
        if sequence.pending_row is not None:
            token_ids.append(-1 - sequence.pending_row)
        elif count == 1:
            token_ids.append(sequence.token_ids[start])
        else:
            token_ids += sequence.token_ids[start : start + count]
            token_ids += sequence.draft_token_ids
    return np.array(token_ids, dtype=np.int64)
