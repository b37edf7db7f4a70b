"""CaptureChecker: stands in for a device that captures graphs, where there is none, and refuses what it would refuse.

A work is refused that reads values, copies numbers from Python, gives shapes that depend on values, or keeps memory
that it made while it was recorded. It is repeated by doing it again, call by call as it was recorded: same operators,
shapes and numbers, on tensors at the same addresses. Any difference is what a device would not have noticed, and is an
error.
"""

import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from autodeploy.compile.capture import Work
from autodeploy.compile.observe import depends_on_values, noticing_reads, tensors

Call = tuple[Any, ...]

_FROM_PYTHON = ("aten::lift_fresh", "aten::lift")
"""Operators through which numbers of Python become a tensor: on a device, by a copy that waits."""


class CaptureChecker:
    """A `Capture` on the CPU."""

    def warm_up(self, work: Work) -> None:
        work()

    def record(self, work: Work) -> Work:
        recorded = _observed(work)

        def replay() -> None:
            again = _observed(work)
            for number, (then, now) in enumerate(itertools.zip_longest(recorded, again)):
                if then != now:
                    raise RuntimeError(f"call {number} was {then} when it was captured and is {now} when repeated")

        return replay

    def used_bytes(self) -> int:
        return 0


def _observed(work: Work) -> list[Call]:
    """Do the work; the calls it makes. Raises RuntimeError for what cannot be captured."""
    observer = _Observer()
    with noticing_reads(_refuse), observer:
        work()
    if observer.outliving():
        _refuse("memory made in it is kept")
    return observer.calls


def _refuse(reason: str) -> None:
    raise RuntimeError(f"a device would not capture this step: {reason}")


@dataclass(frozen=True)
class _Place:
    """A tensor as a call sees it: where it lies and how. Memory made by the work itself is told apart by its number."""

    where: int | str
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class _Observer(TorchDispatchMode):
    """Writes down every operator that is called."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Call] = []
        self._made: dict[int, str] = {}
        """names of memory that the work made"""
        self._alive: list[StorageWeakRef] = []

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """As in `replay.py`."""
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = tensors((args, kwargs))
        if func._schema.name in _FROM_PYTHON:
            _refuse("numbers are copied from Python")
        if depends_on_values(func, given):
            _refuse(f"{func} gives what depends on values")
        self.calls.append((str(func), *map(str, tree_map(self._told_apart, [*args, *kwargs.items()]))))
        known = {value.untyped_storage()._cdata for value in given}
        result = func(*args, **kwargs)
        for value in tensors(result):
            storage = value.untyped_storage()
            if storage._cdata not in known:
                self._made[storage._cdata] = f"memory {len(self._alive)}"
                self._alive.append(StorageWeakRef(storage))
        return result

    def outliving(self) -> bool:
        """Whether something that the work made is still there."""
        return any(not reference.expired() for reference in self._alive)

    def _told_apart(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        storage = value.untyped_storage()
        where = self._made.get(storage._cdata, storage.data_ptr())
        return _Place(where, int(value.storage_offset()), tuple(value.shape), value.stride(), value.dtype)
