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
    """Calls in order. `add_native` and `add_python` while a step runs, `finish` after it, then `run` repeats it."""

    def __init__(self) -> None:
        self._steps: list[Callable[[], None]] = []
        self._pending: list[tuple[NativeCall, bytes]] = []
        self.num_native = self.num_python = 0

    def add_native(self, call: NativeCall, arguments: Sequence[Any]) -> None:
        """Append a native call that was just made."""
        if call.recorded is None:
            self.add_python(lambda: _check(call, call.function(*arguments)))
            return
        self.num_native += 1
        self._pending.append((call, _slots(call.arguments, arguments)))

    def add_python(self, repeat: Callable[[], None]) -> None:
        """Append anything else."""
        self.finish()
        self.num_python += 1
        self._steps.append(repeat)

    def finish(self) -> None:
        """Join the native calls since the last other one."""
        if not self._pending:
            return
        calls, self._pending = self._pending, []
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

        self._steps.append(repeat)

    def run(self) -> None:
        """Make all calls again.

        Raises:
            IndexError: a kernel found its inputs contradictory; nothing outside them was read or written.
        """
        for step in self._steps:
            step()


def _check(call: NativeCall, status: int | None) -> None:
    if status:
        raise IndexError(
            f"{call.symbol} returned fault {status} in a repeated step; "
            "the batch inputs of the step contradict each other"
        )


def _slots(types: tuple[type[Any], ...], arguments: Sequence[Any]) -> bytes:
    """Arguments as csrc/team.h reads them, eight bytes each; the number of threads is that of the running team."""
    return _layout(types).pack(
        *(0 if kind is THREADS or value is None else value for kind, value in zip(types, arguments, strict=True))
    )


@functools.cache
def _layout(types: tuple[type[Any], ...]) -> struct.Struct:
    return struct.Struct("<" + "".join("fxxxx" if kind is FLOAT else "q" for kind in types))
