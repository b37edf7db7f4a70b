"""StreamChecker: stands in for a device's second stream, where there is none, and refuses what would be a race there.

Each stream counts its calls, and knows how many calls of the other one it has waited for. A call is refused that reads
what a call made which its stream has not waited for, or that writes what such a call reads. So is a call on a stream to
which memory was given back that the other one may still use, as the allocator lets a stream use its own memory anew.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from autodeploy.compile.observe import tensors


class Race(RuntimeError):
    """A use of memory that another stream may be using."""


@dataclass
class _Memory:
    """Memory that a call made, and who used it.

    Attributes:
        stream: which it is of.
        written: stream and number of the call that wrote it last.
        used: by stream, the number of the last call that used it.
        name: the call that made it.
    """

    reference: StorageWeakRef
    stream: int
    written: tuple[int, int]
    name: str
    used: dict[int, int] = field(default_factory=dict)


class StreamChecker(TorchDispatchMode):
    """`Streams` on the CPU; calls are watched while it is entered.

    Attributes:
        num_branches: how often the second stream was entered.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.num_branches = 0
        self._current = 0
        self._calls = [0, 0]
        self._waited_for = [[0, 0], [0, 0]]
        self._memory: dict[int, _Memory] = {}

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """As in `compile/replay.py`."""
        return False

    @contextlib.contextmanager
    def beside(self) -> Iterator[None]:
        self.num_branches += 1
        self._wait(1, 0)
        self._current = 1
        try:
            yield
        finally:
            self._current = 0

    def join(self) -> None:
        self._wait(0, 1)

    def _wait(self, stream: int, other: int) -> None:
        self._waited_for[stream][other] = self._calls[other]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        here, name = self._current, str(func)
        self._refuse_reuse(here, name)
        self._calls[here] += 1
        now = self._calls[here]
        given = tensors((args, kwargs))
        written = _written(func, args, kwargs)
        for value in given:
            memory = self._memory.get(value.untyped_storage()._cdata)
            if memory is None or memory.reference.expired():
                continue  # made before anybody watched
            self._require(memory.written, here, f"{name} reads what {memory.name} has made")
            if value.untyped_storage()._cdata in written:
                for user, number in memory.used.items():
                    self._require((user, number), here, f"{name} writes what {memory.name} has made")
                memory.written = (here, now)
            memory.used[here] = now
        result = func(*args, **kwargs)
        known = {value.untyped_storage()._cdata for value in given}
        for value in tensors(result):
            storage = value.untyped_storage()
            if storage._cdata not in known:
                self._memory[storage._cdata] = _Memory(StorageWeakRef(storage), here, (here, now), name, {here: now})
        return result

    def _require(self, use: tuple[int, int], here: int, what: str) -> None:
        """Raises Race where a use, by stream and number, need not be over."""
        stream, number = use
        if stream != here and number > self._waited_for[here][stream]:
            self._memory.clear()  # nothing is known of what follows a race
            raise Race(f"{what} or used on stream {stream}, which stream {here} has not waited for")

    def _refuse_reuse(self, here: int, name: str) -> None:
        for key, memory in list(self._memory.items()):
            if memory.stream == here and memory.reference.expired():
                for use in memory.used.items():
                    self._require(use, here, f"{name} may be given the memory of what {memory.name} has made")
                del self._memory[key]


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> set[int]:
    """Storages that an operator writes to."""
    schema = func._schema
    values = {argument.name: value for argument, value in zip(schema.arguments, args, strict=False)} | kwargs
    return {
        value.untyped_storage()._cdata
        for argument in schema.arguments
        if argument.alias_info is not None and argument.alias_info.is_write
        for value in tensors(values.get(argument.name))
    }
