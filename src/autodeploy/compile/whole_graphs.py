"""Whole graphs: steps in which every sequence brings one token, captured for a few numbers of sequences."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from autodeploy.compile.capture import Capture, Work
from autodeploy.compile.graphed_choice import GraphedChoice
from autodeploy.compile.program import BatchLimits, Chosen, Draws
from autodeploy.compile.segments import Segments
from autodeploy.compile.static_batch import BatchSize, StaticBatch, StaticInput, dummy_batch
from autodeploy.compile.streams import Branches

_ROUNDS = 3
_FASTER = 0.98
"""Share of the time on one stream that a step on two may take; what is within noise is left on one."""


class WholeGraphs:
    """Graphs of whole steps. Page tables are as wide as they can be, as kernels look at what a sequence has alone.

    Args:
        segments: the step.
        inputs: all batch inputs.
        states: state tensors by name; they stay where they are.
        max_sequences: of a step.
        vocab_size: token ids of trial runs are below it.
        choice: chooses tokens inside the graphs.
        branches: what may run on a second stream; whether it does is measured for each number of sequences.

    Attributes:
        on_streams: by number of sequences, whether steps run on two streams, with seconds on one and two, or why not.
    """

    def __init__(
        self,
        segments: Segments,
        inputs: Sequence[StaticInput],
        states: Mapping[str, Tensor],
        limits: BatchLimits,
        *,
        max_sequences: int,
        vocab_size: int,
        device: torch.device,
        choice: GraphedChoice | None = None,
        branches: Branches | None = None,
    ) -> None:
        self._segments, self._inputs, self._states = segments, inputs, states
        self._limits, self._vocab_size, self._device = limits, vocab_size, device
        self._batch = StaticBatch(inputs, BatchSize(max_sequences, max_sequences), limits, device)
        self._logits: Tensor | None = None
        self._replays: dict[int, Work] = {}
        self._choice, self._branches = choice, branches
        self.on_streams: dict[int, dict[str, Any]] = {}

    def capture(self, num_sequences: int, capture: Capture) -> None:
        """Capture a step of this many sequences, the largest number first. Raises RuntimeError with the reason."""
        self._batch.fill(dummy_batch(self._inputs, [1] * num_sequences, self._limits, self._vocab_size, self._device))
        inputs = {**self._batch.views(BatchSize(num_sequences, num_sequences)), **self._states}

        def work() -> None:
            logits = self._segments.run(inputs)
            if self._logits is None:
                self._logits = torch.empty_like(logits)
            self._logits[:num_sequences].copy_(logits)
            if self._choice is not None:
                self._choice.choose(self._logits[:num_sequences], inputs)

        capture.warm_up(work)
        self._replays[num_sequences] = capture.record(work)
        if self._branches is not None and self._branches.count:
            self._replays[num_sequences] = self._faster(num_sequences, work, self._branches, capture)

    def _faster(self, num_sequences: int, work: Work, branches: Branches, capture: Capture) -> Work:
        """The step as it was captured, or with branches on a second stream."""
        one = self._replays[num_sequences]

        def work_on_two() -> None:
            with branches.in_use():
                work()

        try:
            capture.warm_up(work_on_two)
            two = capture.record(work_on_two)
        except RuntimeError as error:
            self.on_streams[num_sequences] = {"used": False, "why_not": str(error).splitlines()[0]}
            return one
        rounds = [(capture.seconds(one), capture.seconds(two)) for _ in range(_ROUNDS)]
        on_one, on_two = (min(times) for times in zip(*rounds, strict=True))
        is_faster = on_two < _FASTER * on_one
        self.on_streams[num_sequences] = {"used": is_faster, "seconds": on_one, "seconds_on_two": on_two}
        return two if is_faster else one

    def run(self, num_sequences: int, batch: Mapping[str, Tensor]) -> Tensor:
        """A step by the graph for this many sequences, no fewer than the batch has and than it wants rows of logits."""
        if self._choice is not None:
            self._choice.fill(None)
        return self._run(num_sequences, batch).clone()

    def run_and_choose(self, num_sequences: int, batch: Mapping[str, Tensor], draws: Draws) -> tuple[Tensor, Chosen]:
        """The same, with tokens for the first rows; to be called with a choice. Logits hold until the next step."""
        assert self._choice is not None
        self._choice.fill(draws)
        return self._run(num_sequences, batch), self._choice.chosen(draws.shares.shape[1])

    def _run(self, num_sequences: int, batch: Mapping[str, Tensor]) -> Tensor:
        assert self._logits is not None
        self._batch.fill(batch)
        self._replays[num_sequences]()
        return self._logits[: batch["logits_indices"].numel()]
