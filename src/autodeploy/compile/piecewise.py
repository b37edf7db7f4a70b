"""Piecewise graphs: the regions of a step captured for a few numbers of tokens, with calls between them.

What crosses from one segment to the next lies in buffers at fixed addresses, which all sizes share. A region sees as
many tokens as its graph was captured for; a call sees those of the batch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autodeploy.compile.capture import Capture, Work
from autodeploy.compile.program import BatchLimits
from autodeploy.compile.segments import Segment, Segments
from autodeploy.compile.static_batch import BatchSize, StaticBatch, StaticInput, dummy_batch

_FEW_TOKENS = 3


@dataclass(frozen=True)
class Crossing:
    """A value that a region reads or writes.

    Attributes:
        shape: for `_FEW_TOKENS` tokens.
        token_dim: the dimension that has a row for each token, or None.
        buffer: flat memory for the largest number of tokens; several values that are not alive together share it.
    """

    shape: tuple[int, ...]
    token_dim: int | None
    buffer: Tensor

    def of(self, num_tokens: int) -> Tensor:
        """The value for a captured number of tokens."""
        shape = _with_tokens(self.shape, self.token_dim, num_tokens)
        return self.buffer[: _numel(shape)].view(shape)


class PiecewiseGraphs:
    """Steps of any kind, in pieces.

    Args:
        segments: the step.
        inputs: all batch inputs.
        states: state tensors by name; they stay where they are.
        max_tokens: of a step.
        vocab_size: token ids of trial runs are below it.
    Raises:
        RuntimeError: what crosses segments has not one row for each token.
    """

    def __init__(
        self,
        segments: Segments,
        inputs: Sequence[StaticInput],
        states: Mapping[str, Tensor],
        limits: BatchLimits,
        *,
        max_tokens: int,
        vocab_size: int,
        device: torch.device,
    ) -> None:
        self._segments, self._inputs, self._states = segments, inputs, states
        self._limits, self._vocab_size, self._device = limits, vocab_size, device
        by_token = [given for given in inputs if given.is_by_token]
        self._batch = StaticBatch(by_token, BatchSize(max_tokens, 0), limits, device)
        self._by_token = {given.name for given in by_token}
        self._crossings = self._find_crossings(max_tokens)
        self._replays: dict[int, list[Work | None]] = {}

    def capture(self, num_tokens: int, capture: Capture) -> None:
        """Capture the regions for a number of tokens. Raises RuntimeError, with the reason, if one cannot be."""
        works = [self._work(segment, num_tokens) if segment.is_region else None for segment in self._segments.segments]
        trial = self._trial(num_tokens)
        capture.warm_up(lambda: _forget(self._run(num_tokens, trial, works)))
        self._replays[num_tokens] = [None if work is None else capture.record(work) for work in works]

    def run(self, num_tokens: int, batch: Mapping[str, Tensor]) -> Tensor:
        """A step by the graphs for a number of tokens, no fewer than the batch has."""
        return self._run(num_tokens, batch, self._replays[num_tokens])

    def _run(self, num_tokens: int, batch: Mapping[str, Tensor], works: Sequence[Work | None]) -> Tensor:
        self._batch.fill(batch)
        count = batch["input_ids"].numel()
        values: dict[str, Tensor] = {}
        result = torch.empty(0)
        for segment, work in zip(self._segments.segments, works, strict=True):
            if work is not None:
                work()
                values.update((name, self._as_batch_sees(name, num_tokens, count)) for name in segment.outputs)
            else:
                arguments = [self._value(name, batch, values) for name in segment.inputs]
                for name, value in zip(segment.outputs, segment.function(*arguments), strict=True):
                    values[name] = value
                    if name in self._crossings:
                        self._as_batch_sees(name, num_tokens, count).copy_(value)
            if self._segments.result in segment.outputs:
                result = values[self._segments.result]
                if work is not None:
                    result = result.clone()
            for name in segment.unread:
                del values[name]
        return result

    def _value(self, name: str, batch: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> Tensor:
        if name in batch:
            return batch[name]
        return self._states[name] if name in self._states else values[name]

    def _as_batch_sees(self, name: str, num_tokens: int, count: int) -> Tensor:
        crossing = self._crossings[name]
        whole = crossing.of(num_tokens)
        return whole if crossing.token_dim is None else whole.narrow(crossing.token_dim, 0, count)

    def _work(self, segment: Segment, num_tokens: int) -> Work:
        """A region from and to its buffers."""
        views = self._batch.views(BatchSize(num_tokens, 0))
        known = {name: crossing.of(num_tokens) for name, crossing in self._crossings.items()}
        arguments = [self._value(name, views, known) for name in segment.inputs]
        targets = [known[name] for name in segment.outputs]

        def work() -> None:
            for target, value in zip(targets, segment.function(*arguments), strict=True):
                target.copy_(value)

        return work

    def _trial(self, num_tokens: int) -> dict[str, Tensor]:
        """A batch to try a step with, which is planned for it."""
        longest = self._limits.max_model_len
        lengths = [longest] * (num_tokens // longest) + [num_tokens % longest] * (num_tokens % longest > 0)
        batch = dummy_batch(self._inputs, lengths, self._limits, self._vocab_size, self._device)
        for plan in self._segments.plans:
            plan.prepare(batch, self._states)
        return batch

    def _find_crossings(self, max_tokens: int) -> dict[str, Crossing]:
        """What regions read and write; how its shape depends on the number of tokens shows in two small steps."""
        shapes: list[dict[str, tuple[int, ...]]] = []
        values: dict[str, Tensor] = {}
        for count in (_FEW_TOKENS - 1, _FEW_TOKENS):
            values = {}
            self._segments.run({**self._trial(count), **self._states}, values)
            shapes.append({name: tuple(value.shape) for name, value in values.items()})
        of_regions = {name for segment in self._segments.segments if segment.is_region for name in segment.outputs}
        of_regions |= {
            name
            for segment in self._segments.segments
            if segment.is_region
            for name in segment.inputs
            if name in values
        }
        crossings: dict[str, Crossing] = {}
        free: list[Tensor] = []
        for segment in self._segments.segments:
            for name in segment.outputs:
                if name in of_regions:
                    fewer, shape = shapes[0][name], shapes[1][name]
                    dim = _token_dim(name, fewer, shape)
                    size = _numel(_with_tokens(shape, dim, max_tokens))
                    buffer = _taken(free, size, values[name].dtype, self._device)
                    crossings[name] = Crossing(shape, dim, buffer)
            free += [crossings[name].buffer for name in segment.unread if name in crossings]
        return crossings


def _token_dim(name: str, fewer: tuple[int, ...], shape: tuple[int, ...]) -> int | None:
    """The dimension that has a row for each token. Raises RuntimeError where tokens are laid out in another way."""
    dims = [dim for dim, (few, more) in enumerate(zip(fewer, shape, strict=True)) if few != more]
    if not dims:
        return None
    (dim, *others) = dims
    if others or (fewer[dim], shape[dim]) != (_FEW_TOKENS - 1, _FEW_TOKENS):
        raise RuntimeError(f"{name} is {shape} for {_FEW_TOKENS} tokens and {fewer} for one less, not a row for each")
    return dim


def _with_tokens(shape: tuple[int, ...], dim: int | None, num_tokens: int) -> tuple[int, ...]:
    return tuple(num_tokens if index == dim else size for index, size in enumerate(shape))


def _numel(shape: tuple[int, ...]) -> int:
    return torch.Size(shape).numel()


def _taken(free: list[Tensor], size: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A free buffer of this size and dtype, or a new one."""
    for index, buffer in enumerate(free):
        if buffer.numel() == size and buffer.dtype == dtype:
            return free.pop(index)
    return torch.zeros(size, dtype=dtype, device=device)


def _forget(_: Tensor) -> None:
    """The result of a trial run is of no interest."""
