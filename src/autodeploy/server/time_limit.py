"""Ends Python code that takes too long: a chat template is a program that a stranger may have written."""

import ctypes
import threading
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


class OutOfTimeError(Exception):
    """The work was ended."""


def run_within(seconds: float, work: Callable[[], Result]) -> Result:
    """Run `work` in a thread of its own; when it takes longer, an exception is raised in it.

    The exception arrives between two of its bytecodes, so that locks are released as after any other.

    Raises:
        OutOfTimeError: it took longer.
    """
    results: list[Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="autodeploy-timed", daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive() and thread.ident is not None:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(OutOfTimeError))
        thread.join(seconds)
        raise OutOfTimeError(f"it took longer than {seconds:g} seconds")
    if errors:
        raise errors[0]
    return results[0]
