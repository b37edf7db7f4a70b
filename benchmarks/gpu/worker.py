"""The process of a job: `{model, precision, figures, smoke, profiles}` as JSON in; one line of JSON per figure out."""

import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu import ours, theirs
from gpu.jobs import MARK


def _tell(name: str, work: Callable[[], Any]) -> Any:
    """Do the work and print what it gave, or why it failed: a figure like any other, others can still be taken."""
    print(f"  {name} ...", flush=True)
    begin, told = time.perf_counter(), None
    try:
        result = work()
        told = result[1] if isinstance(result, tuple) else result
    except Exception as error:
        result, told = None, {"error": f"{type(error).__name__}: {error}"[:1000]}
    line = {"figure": name, "took_seconds": round(time.perf_counter() - begin, 2), **told}
    print(MARK + json.dumps(line, default=str), flush=True)
    return result


def main() -> None:
    """Do one job."""
    job = json.loads(sys.argv[1])
    name, precision, smoke, wanted = job["model"], job["precision"], job["smoke"], job["figures"]
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if wanted == ["transformers"]:
            _tell("transformers", lambda: theirs.single(name, smoke=smoke))
        elif wanted == ["first_token"]:
            _tell("first_token", lambda: ours.first_token(name, precision, folder, smoke=smoke))
        else:
            profiles = Path(job["profiles"])
            result = _tell("build", lambda: ours.built(name, precision, folder, profiles, smoke=smoke))
            for figure in wanted if result is not None else ():
                _tell(figure, lambda figure=figure: ours.FIGURES[figure](result[0]))


if __name__ == "__main__":
    main()
