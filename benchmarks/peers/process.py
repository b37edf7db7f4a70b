"""A peer's process as the benchmark sees it: launched with a job, asked one question at a time, held still in between.

Peers stay loaded between their turns. A process that is stopped takes no time from the one that is measured, however
its threads wait.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import psutil


class PeerError(RuntimeError):
    """A peer that could not do what it was asked; the message is for the record."""


class Peer:
    """One running peer.

    Args:
        command: what runs its adapter.
        job: first line of its input: model, precision, threads.
        variables: environment variables on top of our own.
        log: file that its stderr is added to.
    """

    def __init__(self, command: Sequence[str], job: dict[str, Any], variables: dict[str, str], log: Path) -> None:
        self._began = time.perf_counter()
        self._log = log
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                command,
                env=os.environ | variables,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
                text=True,
            )
        self._write(job)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def ask(self, question: str, **arguments: Any) -> dict[str, Any]:
        """Let it run, ask, hold it still again.

        Raises:
            PeerError: it failed, or is gone.
        """
        self._signal(signal.SIGCONT)
        self._write({"ask": question} | arguments)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        self.seconds_since_launch = time.perf_counter() - self._began
        if not line:
            raise PeerError(f"ended with status {self._process.wait()}; its last words are in {self._log}")
        self._signal(signal.SIGSTOP)
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer

    def peak_bytes(self) -> int:
        """The most memory that it and its children have held so far, added up."""
        process = psutil.Process(self._process.pid)
        return sum(_high_water(each.pid) for each in (process, *process.children(recursive=True)))

    def end(self) -> None:
        """Kill it with its children."""
        self._signal(signal.SIGKILL)
        self._process.communicate()

    def _write(self, line: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # reading its answer tells what happened
            self._process.stdin.write(json.dumps(line) + "\n")
            self._process.stdin.flush()

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


def _high_water(pid: int) -> int:
    with suppress(OSError):  # it may have ended meanwhile
        for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0
