"""The law of cached ops, for any op: however a sequence is split, packed and evicted, the result is the whole one's."""

import itertools
import random
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from autodeploy.ops import Op
from autodeploy.ops.state import PagedState

PAGE_SIZE = 4


class Replay:
    """Runs an op's cached twin over a schedule of chunks and collects each sequence's results."""

    def __init__(self, op: Op, sample: Mapping[str, Any], seed: int):
        assert op.states is not None and op.cached is not None
        self.op, self.sample, self.random = op, sample, random.Random(seed)
        # an op that looks at no other token takes no borders, and any will do
        borders = sample["cu_seqlens"].tolist() if "cu_seqlens" in sample else [0, 9, sample["x"].shape[1]]
        self.rows = [slice(a, b) for a, b in itertools.pairwise(borders)]
        self.num_tokens = borders[-1]
        self.specs = op.states(**sample)
        self.pages_each = max(-(-(row.stop - row.start) // PAGE_SIZE) for row in self.rows)
        count = len(self.rows)
        numbers = list(range(1, count * self.pages_each + 1))
        self.random.shuffle(numbers)  # pages of a sequence are anywhere, in any order
        self.pages = [numbers[s * self.pages_each : (s + 1) * self.pages_each] for s in range(count)]
        self.states = {
            name: torch.full(
                (len(numbers) + 1, PAGE_SIZE, *spec.shape)
                if isinstance(spec, PagedState)
                else (count + 1, *spec.shape),
                float("nan") if isinstance(spec, PagedState) else 0.0,  # unwritten entries must never be read
                dtype=spec.dtype,
            )
            for name, spec in self.specs.items()
        }
        self.done = [0] * count
        self.results: list[list[Tensor]] = [[] for _ in self.rows]

    def run(self) -> Tensor:
        """Random chunks of random sequences, packed in random order, with evictions; the whole row's result."""
        while any(done < row.stop - row.start for done, row in zip(self.done, self.rows, strict=True)):
            if self.random.random() < 0.2:
                self._evict(self.random.randrange(len(self.rows)))
            chosen = [s for s, row in enumerate(self.rows) if self.done[s] < row.stop - row.start]
            self.random.shuffle(chosen)
            self._step(chosen[: self.random.randint(1, len(chosen))])
        return torch.cat([torch.cat(parts, dim=1) for parts in self.results], dim=1)

    def _evict(self, sequence: int) -> None:
        """Forget a sequence, as preemption by recompute does; its pages hold rubbish afterwards."""
        self.done[sequence], self.results[sequence] = 0, []
        for name, spec in self.specs.items():
            if isinstance(spec, PagedState):
                self.states[name][self.pages[sequence]] = float("nan")
            else:
                self.states[name][sequence + 1] = 0

    def _step(self, sequences: list[int]) -> None:
        left = [self.rows[s].stop - self.rows[s].start - self.done[s] for s in sequences]
        counts = [self.random.randint(1, n) for n in left]
        rows = torch.cat(
            [self.rows[s].start + self.done[s] + torch.arange(n) for s, n in zip(sequences, counts, strict=True)]
        )
        positions = torch.cat([self.done[s] + torch.arange(n) for s, n in zip(sequences, counts, strict=True)])
        owners = torch.repeat_interleave(torch.tensor(sequences), torch.tensor(counts))
        tables = torch.tensor(self.pages)
        batch = {
            "cu_seqlens": torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32),
            "seq_lens": torch.tensor(
                [self.done[s] + n for s, n in zip(sequences, counts, strict=True)], dtype=torch.int32
            ),
            "position_ids": positions[None],
            "page_table": tables[sequences].to(torch.int32),
            "slot_mapping": tables[owners, positions // PAGE_SIZE] * PAGE_SIZE + positions % PAGE_SIZE,
            "state_slots": torch.tensor([s + 1 for s in sequences], dtype=torch.int32),
        }
        assert self.op.cached is not None
        output = self.op.cached(**self._arguments(rows, batch))
        for part, sequence, count in zip(output.split(counts, dim=1), sequences, counts, strict=True):
            self.results[sequence].append(part)
            self.done[sequence] += count

    def _arguments(self, rows: Tensor, batch: Mapping[str, Tensor]) -> dict[str, Any]:
        """Bind the twin's parameters by name, as cache insertion does; per-token arguments are cut to the chunk."""
        assert self.op.cached is not None
        arguments: dict[str, Any] = {}
        for name in self.op.cached.parameters:
            if name in self.states:
                arguments[name] = self.states[name]
            elif name in batch:
                arguments[name] = batch[name]
            else:
                arguments[name] = self._cut(self.sample[name], rows)
        return arguments

    def _cut(self, value: Any, rows: Tensor) -> Any:
        if isinstance(value, list):
            return [self._cut(part, rows) for part in value]
        per_token = isinstance(value, Tensor) and value.dim() > 2 and value.shape[:2] == (1, self.num_tokens)
        return value[:, rows] if per_token else value
