"""Batch inputs at fixed addresses: a batch goes in, the same batch padded to the size of a captured graph comes out.

Padding is tokens of nobody: token 0 at position 0 of sequences that live in the scratch slot and on the scratch page,
one token each. What they compute is written there and read by nobody.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autodeploy.compile.program import BatchLimits
from autodeploy.ops.batch_inputs import lookup

_DUMMY_CONTEXT_TOKENS = 1024
"""Context of the sequences of a dummy batch: long enough that kernels which are measured on it have something to do."""


@dataclass(frozen=True)
class StaticInput:
    """A batch input of a graph.

    Attributes:
        dims: sizes by the letters of `ops/batch_inputs.py`; an int is a fixed size.
        dtype: of its elements.
    """

    name: str
    dims: tuple[str | int, ...]
    dtype: torch.dtype

    @staticmethod
    def of(name: str, example: Tensor) -> "StaticInput":
        """The input of this name; one that is not declared has a row for each token, as hidden states have.

        Args:
            example: a tensor of its dtype, and of its sizes where they are fixed.
        """
        declared = lookup(name)
        dims: tuple[str | int, ...] = (1, "T", *map(int, example.shape[2:])) if declared is None else declared.dims
        return StaticInput(name, dims, example.dtype)

    @property
    def length_dim(self) -> int:
        """The dimension that grows with the batch."""
        return next(index for index, dim in enumerate(self.dims) if isinstance(dim, str))

    @property
    def is_by_token(self) -> bool:
        return all(dim == "T" or isinstance(dim, int) for dim in self.dims)


@dataclass(frozen=True)
class BatchSize:
    """Tokens and sequences of a batch; rows of logits are as many as sequences, pages as many as there can be."""

    num_tokens: int
    num_sequences: int

    def shape(self, given: StaticInput, limits: BatchLimits) -> tuple[int, ...]:
        sizes = {
            "T": self.num_tokens,
            "S": self.num_sequences,
            "S+1": self.num_sequences + 1,
            "R": self.num_sequences,
            "P": limits.max_pages,
        }
        return tuple(sizes[dim] if isinstance(dim, str) else dim for dim in given.dims)


class StaticBatch:
    """Buffers of batch inputs, shared by all batch sizes up to the largest.

    Args:
        inputs: what to keep.
        largest: sizes of the buffers.
        limits: of which the width of page tables follows.
    """

    def __init__(
        self, inputs: Sequence[StaticInput], largest: BatchSize, limits: BatchLimits, device: torch.device
    ) -> None:
        self._inputs = {given.name: given for given in inputs}
        self._limits = limits
        self._buffers = {
            given.name: _padding(given, largest.shape(given, limits), device).contiguous() for given in inputs
        }
        self._filled = dict.fromkeys(self._buffers, 0)
        """length of what is not padding in each buffer"""

    @property
    def num_bytes(self) -> int:
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def views(self, size: BatchSize) -> dict[str, Tensor]:
        """The buffers as a batch of this size reads them."""
        return {
            name: buffer.narrow(
                self._inputs[name].length_dim,
                0,
                size.shape(self._inputs[name], self._limits)[self._inputs[name].length_dim],
            )
            for name, buffer in self._buffers.items()
        }

    def fill(self, batch: Mapping[str, Tensor]) -> None:
        """Copy a batch to the buffers; behind it is padding.

        Where sequences begin is left alone: in a batch that has it here every sequence has one token. Columns of page
        tables behind those of the batch keep what they had, as nothing looks behind the end of a sequence.
        """
        for name, buffer in self._buffers.items():
            given = self._inputs[name]
            if "S+1" in given.dims:
                continue
            value, dim = batch[name], given.length_dim
            length, filled = value.shape[dim], self._filled[name]
            target = buffer.narrow(dim, 0, length)
            if "P" in given.dims:
                target = target[:, : value.shape[1]]
            target.copy_(value)
            if filled > length:
                buffer.narrow(dim, length, filled - length).fill_(1 if name == "seq_lens" else 0)
            self._filled[name] = length


def _padding(given: StaticInput, shape: tuple[int, ...], device: torch.device) -> Tensor:
    if "S+1" in given.dims:
        return torch.arange(shape[0], dtype=given.dtype, device=device)
    value = 1 if given.name == "seq_lens" else 0
    return torch.full(shape, value, dtype=given.dtype, device=device)


def dummy_batch(
    inputs: Sequence[StaticInput], lengths: Sequence[int], limits: BatchLimits, vocab_size: int, device: torch.device
) -> dict[str, Tensor]:
    """A batch for trial runs, of sequences that bring these numbers of tokens, all in the scratch slot and on the
    scratch page. Token ids differ, so that routers choose different experts.
    """
    counts = torch.tensor(lengths)
    num_tokens = int(counts.sum())
    least = torch.full_like(counts, min(_DUMMY_CONTEXT_TOKENS, limits.max_model_len))
    ends = torch.maximum(counts, least)
    offsets = torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0)))
    positions = torch.cat([torch.arange(int(end) - int(n), int(end)) for n, end in zip(counts, ends, strict=True)])
    values = {
        "input_ids": (torch.arange(num_tokens) % vocab_size)[None],
        "position_ids": positions[None],
        "cu_seqlens": offsets,
        "seq_lens": ends,
        "logits_indices": offsets[1:] - 1,
    }
    size = BatchSize(num_tokens, len(lengths))
    return {
        given.name: (
            values[given.name].to(device, given.dtype)
            if given.name in values
            else torch.zeros(size.shape(given, limits), dtype=given.dtype, device=device)
        )
        for given in inputs
    }
