"""Tape: a step's kernel calls go in as they are made; out comes the step as a few native calls.

A call's arguments are addresses and sizes, so the same call can be made again without Python: one native call walks
through all that follow each other, with one team of threads (csrc/tape.cpp). What is no native kernel, or one that
cannot be repeated that way, stays a call from Python in its place.
"""

import ctypes
import functools
import struct
from collections.abc import Callable, Sequence
from typing import Any

import torch

from autodeploy.kernels.cpu.native import FLOAT, INT64, THREADS, NativeCall, library

_SLOT_BYTES = 8
FAULT_SHIFT = 256
"""As `run_tape` in csrc/tape.cpp encodes which call failed."""


class _Entry(ctypes.Structure):
    _fields_ = (("function", ctypes.c_void_p), ("arguments", ctypes.c_void_p))


class Tape:
    """Calls in order. `add_native` and `add_python` while a step runs, `finish` after it, then `run` repeats it.

    A native call is made when somebody is to read what it computes: `catch_up` makes all those that wait, as one.
    """

    def __init__(self) -> None:
        self._steps: list[Callable[[], None]] = []
        self._pending: list[tuple[NativeCall, bytes]] = []
        """native calls since the last other one"""
        self._num_made = 0
        """how many of them were made"""
        self.num_native = self.num_python = 0

    def add_native(self, call: NativeCall, *arguments: Any) -> int:
        """Append a native call, which is made later, or at once where the tape cannot make it; its status."""
        if call.recorded is None:
            self.finish()
            status: int = call.function(*arguments) or 0
            self.add_python(lambda: _check(call, call.function(*arguments)))
            return status
        self.num_native += 1
        self._pending.append((call, _slots(call.arguments, arguments)))
        return 0

    def add_python(self, repeat: Callable[[], None]) -> None:
        """Append anything else, which was just done, after `catch_up`."""
        self.finish()
        self.num_python += 1
        self._steps.append(repeat)

    def catch_up(self) -> None:
        """Make the native calls that wait.

        Raises:
            IndexError: as `run`.
        """
        waiting = self._pending[self._num_made :]
        self._num_made = len(self._pending)
        if waiting:
            _joined(waiting)()

    def finish(self) -> None:
        """Make the native calls that wait, and join all since the last other one.

        Raises:
            IndexError: as `run`.
        """
        if not self._pending:
            return
        repeat = _joined(self._pending)
        if self._num_made:
            self.catch_up()
        else:
            repeat()
        self._steps.append(repeat)
        self._pending, self._num_made = [], 0

    def run(self) -> None:
        """Make all calls again.

        Raises:
            IndexError: a kernel found its inputs contradictory; nothing outside them was read or written.
        """
        for step in self._steps:
            step()


def _joined(calls: Sequence[tuple[NativeCall, bytes]]) -> Callable[[], None]:
    """One native call that makes all of these."""
    count = len(calls)
    packed = b"".join(slots for _, slots in calls)
    slots = (INT64 * (len(packed) // _SLOT_BYTES)).from_buffer_copy(packed)
    entries, at = (_Entry * count)(), ctypes.addressof(slots)
    for entry, (call, own) in zip(entries, calls, strict=True):
        entry.function, entry.arguments = call.recorded, at
        at += len(own)
    run = library().run_tape
    run.argtypes, run.restype = (ctypes.c_void_p, INT64, ctypes.c_int), INT64

    def repeat(_: object = slots) -> None:
        found = run(entries, count, torch.get_num_threads())
        if found:
            _check(calls[found // FAULT_SHIFT - 1][0], found % FAULT_SHIFT)

    return repeat


def _check(call: NativeCall, status: int | None) -> None:
    if status:
        raise IndexError(
            f"{call.symbol} returned fault {status} in a step that is repeated; "
            "the batch inputs of the step contradict each other"
        )


def _slots(types: tuple[type[Any], ...], arguments: Sequence[Any]) -> bytes:
    """Arguments as csrc/team.h reads them, eight bytes each; the number of threads is that of the running team."""
    layout, threads = _layout(types)
    values = [0 if value is None else value for value in arguments]
    values[threads] = 0
    return layout.pack(*values)


@functools.cache
def _layout(types: tuple[type[Any], ...]) -> tuple[struct.Struct, int]:
    """How arguments of these types lie, and which of them is the number of threads."""
    return struct.Struct("<" + "".join("fxxxx" if kind is FLOAT else "q" for kind in types)), types.index(THREADS)
