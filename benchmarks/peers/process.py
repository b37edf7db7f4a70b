"""A peer's process as the benchmark sees it: launched with a job or as a server, held still between its turns.

Peers stay loaded between their turns. A process that is stopped takes no time from the one that is measured, however
its threads wait.
"""

import json
import os
import signal
import socket
import subprocess
import time
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import psutil


class PeerError(RuntimeError):
    """A peer that could not do what it was asked; the message is for the record."""


class ProcessGroup:
    """A running process and its children.

    Args:
        variables: environment variables on top of our own.
        log: file that its stderr is added to.
        stdout: as `subprocess` has it; with a pipe, stdin is one too.
    """

    def __init__(self, command: Sequence[str], variables: dict[str, str], log: Path, stdout: int | None) -> None:
        self._log = log
        inherited = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                command,
                env=inherited | variables,  # bytecode is kept, as that of installed packages is
                stdin=subprocess.PIPE if stdout == subprocess.PIPE else subprocess.DEVNULL,
                stdout=errors if stdout is None else stdout,
                stderr=errors,
                start_new_session=True,
                text=True,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    @property
    def pid(self) -> int:
        return self._process.pid

    def peak_bytes(self) -> int:
        """The most memory that it and its children have held so far, added up."""
        process = psutil.Process(self._process.pid)
        return sum(_high_water(each.pid) for each in (process, *process.children(recursive=True)))

    def hold(self) -> None:
        """Let all of it stand still."""
        self._signal(signal.SIGSTOP)

    def release(self) -> None:
        """Let it run again."""
        self._signal(signal.SIGCONT)

    def end(self) -> None:
        """Kill it with its children."""
        self._signal(signal.SIGKILL)
        self._process.communicate()

    def _signal(self, number: int) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


class Peer(ProcessGroup):
    """One running peer.

    Args:
        command: what runs its adapter.
        job: first line of its input: model, precision, threads.
        variables, log: as `ProcessGroup` has them.
    """

    def __init__(self, command: Sequence[str], job: dict[str, Any], variables: dict[str, str], log: Path) -> None:
        self._began = time.perf_counter()
        super().__init__(command, variables, log, subprocess.PIPE)
        self._write(job)

    def ask(self, question: str, **arguments: Any) -> dict[str, Any]:
        """Let it run, ask, hold it still again.

        Raises:
            PeerError: it failed, or is gone.
        """
        self.release()
        self._write({"ask": question} | arguments)
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        self.seconds_since_launch = time.perf_counter() - self._began
        if not line:
            raise PeerError(f"ended with status {self._process.wait()}; its last words are in {self._log}")
        self.hold()
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise PeerError(answer["error"])
        return answer

    def _write(self, line: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # reading its answer tells what happened
            self._process.stdin.write(json.dumps(line) + "\n")
            self._process.stdin.flush()


class Server(ProcessGroup):
    """One running HTTP server on a port of this machine.

    Args:
        command: what runs it, with `{port}` where its port belongs.
        variables, log: as `ProcessGroup` has them; what it prints goes to the log too.
    """

    def __init__(self, command: Sequence[str], variables: dict[str, str], log: Path) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        super().__init__([part.replace("{port}", str(port)) for part in command], variables, log, None)

    def wait_until_ready(self, path: str, seconds: float) -> None:
        """Return when `path` is answered with success.

        Raises:
            PeerError: it has ended, or is not ready in time.
        """
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if (status := self._process.poll()) is not None:
                raise PeerError(f"ended with status {status}; its last words are in {self._log}")
            with suppress(OSError), urllib.request.urlopen(self.url + path, timeout=5):
                return
            time.sleep(0.1)
        raise PeerError(f"not ready after {seconds:.0f} seconds; its last words are in {self._log}")


def _high_water(pid: int) -> int:
    with suppress(OSError):  # it may have ended meanwhile
        for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0
