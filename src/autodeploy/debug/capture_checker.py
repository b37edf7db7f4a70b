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
from torch.utils._pytree import tree_leaves

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

    def seconds(self, repeat: Work) -> float:
        """Nothing is faster than anything else here."""
        repeat()
        return 0.0

    def used_bytes(self) -> int:
        return 0


def _observed(work: Work) -> list[Call]:
    """Do the work; the calls it makes. Raises RuntimeError for what cannot be captured."""
    observer = _Observer()
    with noticing_reads(_refuse), observer:
        work()
    return observer.finished()


def _refuse(reason: str) -> None:
    raise RuntimeError(f"a device would not capture this step: {reason}")


class _Memory:
    """Memory that a call of the work sees.

    Args:
        number: of those that the work sees, in the order in which it does.
        is_made: whether an operator of the work was seen to make it. Code that Inductor compiled makes its own unseen.
    """

    def __init__(self, storage: torch.UntypedStorage, number: int, *, is_made: bool) -> None:
        self._reference, self._address, self._number = StorageWeakRef(storage), storage.data_ptr(), number
        self._is_made = is_made

    @property
    def is_gone(self) -> bool:
        return bool(self._reference.expired())

    @property
    def is_left_behind(self) -> bool:
        return self._is_made and not self.is_gone

    def told_apart(self) -> str:
        """By its number what lived in the work alone, and may lie elsewhere the next time; by its address the rest."""
        return f"memory {self._number}" if self._is_made or self.is_gone else hex(self._address)


@dataclass(frozen=True)
class _Place:
    """A tensor as a call sees it: where it lies and how."""

    memory: _Memory
    layout: tuple[Any, ...]

    def __str__(self) -> str:
        return f"{self.memory.told_apart()} {self.layout}"


class _Observer(TorchDispatchMode):
    """Writes down every operator that is called."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._calls: list[tuple[Any, ...]] = []
        self._memory: list[_Memory] = []
        self._latest: dict[int, _Memory] = {}
        """by the identity of a storage, which a later one may have again"""

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
        self._calls.append((func, [self._seen(leaf) for leaf in tree_leaves((args, kwargs))]))
        known = {value.untyped_storage()._cdata for value in given}
        result = func(*args, **kwargs)
        for value in tensors(result):
            storage = value.untyped_storage()
            if storage._cdata not in known:
                self._note(storage, is_made=True)
        return result

    def finished(self) -> list[Call]:
        """The calls, when nothing of the work is held any more. Raises RuntimeError for memory that is."""
        if any(memory.is_left_behind for memory in self._memory):
            _refuse("memory made in it is kept")
        return [(str(func), *map(str, seen)) for func, seen in self._calls]

    def _seen(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        storage = value.untyped_storage()
        memory = self._latest.get(storage._cdata)
        if memory is None or memory.is_gone:
            memory = self._note(storage, is_made=False)
        return _Place(memory, (value.storage_offset(), tuple(value.shape), value.stride(), value.dtype))

    def _note(self, storage: torch.UntypedStorage, *, is_made: bool) -> _Memory:
        memory = _Memory(storage, len(self._memory), is_made=is_made)
        self._memory.append(memory)
        self._latest[storage._cdata] = memory
        return memory
