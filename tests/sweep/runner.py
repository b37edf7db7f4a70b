"""Many architectures, each in a process of its own: names go in, results come out as they are ready, and as files.

Children are forked from a parent that has imported everything and has built one model, so that each costs only its own
work. One that dies, takes too long or too much memory is a failure of the stage it was in. Results are kept by the
state of the code: what has been examined since the last change is not examined again.
"""

import hashlib
import json
import os
import resource
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from tests.sweep.stages import Result, examine

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "build" / "sweep"
CPU_SECONDS = 240
"""of one architecture's process; wall time would count the neighbours"""
DATA_BYTES = 6 * 2**30


def state_of_the_code() -> str:
    """Changes with every file a result depends on."""
    files = [*(ROOT / "src").rglob("*.py"), *(ROOT / "src").rglob("*.cpp"), *Path(__file__).parent.glob("*.py")]
    files.append(ROOT / "tests" / "models" / "families.yaml")
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def sweep(names: Sequence[str], stages: tuple[str, ...], *, jobs: int, fresh: bool = False) -> Iterator[Result]:
    """Examine architectures, `jobs` at a time; results come in the order in which they are ready.

    Args:
        names: model types.
        stages: those to run.
        fresh: also examine what has a result for this state of the code.
    """
    RESULTS.mkdir(parents=True, exist_ok=True)
    code = state_of_the_code()
    waiting = []
    for name in names:
        known = None if fresh else _read(name)
        if known is not None and known["code"] == code and known["asked"] == list(stages) and "at" not in known:
            yield known
        else:
            waiting.append(name)
    running: dict[int, str] = {}
    while waiting or running:
        while waiting and len(running) < jobs:
            name = waiting.pop(0)
            _path(name).unlink(missing_ok=True)
            running[_fork(name, stages, code)] = name
        pid, status = os.wait()
        yield _outcome(running.pop(pid), status)


def _fork(name: str, stages: tuple[str, ...], code: str) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        log = os.open(RESULTS / f"{name}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 5))
        resource.setrlimit(resource.RLIMIT_DATA, (DATA_BYTES, DATA_BYTES))

        def save(result: Result) -> None:
            result |= {"code": code, "asked": list(stages), "seconds": round(time.process_time(), 1)}
            partial = RESULTS / f"{name}.partial"
            partial.write_text(json.dumps(result, indent=1), encoding="utf-8")
            partial.replace(_path(name))

        examine(name, stages, save)
    finally:
        os._exit(0)


def _outcome(name: str, status: int) -> Result:
    """The child's result; one that did not finish failed in the stage it was in."""
    result = _read(name) or {"name": name, "stages": {}, "mixers": {}, "at": "instantiate"}
    stage = result.pop("at", None)
    if stage is not None:
        number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        how = f"more than {CPU_SECONDS} CPU seconds" if number == signal.SIGXCPU else f"the process died ({number})"
        result["stages"][stage] = {"ok": False, "detail": how, "seconds": 0}
        result |= {"status": "failed", "reason": f"{stage}: {how}"}
        _path(name).write_text(json.dumps(result, indent=1), encoding="utf-8")
    return result


def _path(name: str) -> Path:
    return RESULTS / f"{name}.json"


def _read(name: str) -> Result | None:
    if not _path(name).exists():
        return None
    result: Result = json.loads(_path(name).read_text(encoding="utf-8"))
    return result
