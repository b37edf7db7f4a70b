"""Jobs: models, figures and precisions go in; processes to run come out, the most telling first, and what each says."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
MARK = "FIGURE "
"""What a worker's lines begin with that are for the record; all others are for who watches."""

# Model, precision and figures of a process, in the order in which they are taken.
PLAN: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("llama-3.1-8b", "bf16", ("single", "profile", "throughput")),
    ("llama-3.1-8b", "bf16", ("transformers",)),
    ("llama-3.1-8b", "bf16", ("start",)),
    ("nemotron-3-nano-30b-a3b", "bf16", ("single", "profile", "throughput")),
    ("qwen2.5-3b", "bf16", ("transformers",)),
    ("llama-3.1-8b", "fp8", ("single", "throughput")),
    ("qwen2.5-3b", "bf16", ("single", "long")),
    ("nemotron-flash-3b", "bf16", ("single", "long")),
    ("qwen3-30b-a3b", "bf16", ("single", "profile", "throughput")),
    ("gpt-oss-20b", "bf16", ("single", "profile", "throughput")),
    ("nemotron-3-nano-30b-a3b", "bf16", ("transformers",)),
    ("qwen3-30b-a3b", "bf16", ("transformers",)),
    ("gpt-oss-20b", "bf16", ("transformers",)),
)
MODELS = tuple(dict.fromkeys(model for model, _, _ in PLAN))
FIGURES = ("single", "profile", "throughput", "long", "start", "transformers")
PRECISIONS = tuple(dict.fromkeys(precision for _, precision, _ in PLAN))


@dataclass(frozen=True)
class Job:
    """One process; for `start` two."""

    model: str
    precision: str
    figures: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.model} {self.precision}: {', '.join(self.figures)}"


def jobs(
    models: Sequence[str], figures: Sequence[str], precisions: Sequence[str], done: Sequence[dict[str, Any]]
) -> list[Job]:
    """What is left to run of the plan; what the record has without an error is not done again."""
    known = {(entry["model"], entry["precision"], entry["figure"]) for entry in done if "error" not in entry}
    left = []
    for model, precision, all_figures in PLAN:
        wanted = [name for name in all_figures if name in figures and (model, precision, _kept_as(name)) not in known]
        if model in models and precision in precisions and wanted:
            left.append(Job(model, precision, tuple(wanted)))
    return left


def _kept_as(figure: str) -> str:
    return "start_warm" if figure == "start" else figure


def run(job: Job, seconds: float, *, smoke: bool, profiles: Path) -> Iterator[dict[str, Any]]:
    """Run a job for at most so long; entries for the record, each as soon as it is known."""
    about = {"model": job.model, "precision": job.precision}
    if job.figures != ("start",):
        folder = profiles / f"{job.model}-{job.precision}"
        yield from (about | each for each in _process(about, job.figures, seconds, smoke, str(folder), {}))
        return
    end = time.perf_counter() + seconds
    with tempfile.TemporaryDirectory() as cache:
        names = {"AUTODEPLOY_CACHE": "autodeploy", "TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
        variables = {variable: str(Path(cache) / name) for variable, name in names.items()}
        for kind in ("cold", "warm"):
            begin = time.perf_counter()
            for each in _process(about, ("first_token",), end - begin, smoke, "", variables):
                launched = {"seconds": time.perf_counter() - begin} if "error" not in each else {}
                yield about | each | launched | {"figure": f"start_{kind}"}


def _process(
    about: dict[str, str], figures: Sequence[str], seconds: float, smoke: bool, profiles: str, variables: dict[str, str]
) -> Iterator[dict[str, Any]]:
    """What a worker says; it is killed when its time is up, which is an entry of what it was at."""
    job = json.dumps({**about, "figures": list(figures), "smoke": smoke, "profiles": profiles})
    paths = [str(ROOT / "src"), str(ROOT), str(ROOT / "benchmarks")]  # packages, tests.seed_models, gpu.worker
    left = [*figures]
    process = subprocess.Popen(
        [sys.executable, "-m", "gpu.worker", job],
        env=os.environ | variables | {"PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        text=True,
        process_group=0,
    )
    # With those that compile for it, which would hold the pipe open.
    timer = threading.Timer(max(seconds, 1.0), os.killpg, (process.pid, signal.SIGKILL))
    timer.start()
    with process:
        assert process.stdout is not None
        for line in process.stdout:
            if not line.startswith(MARK):
                print(line, end="", flush=True)
                continue
            entry = json.loads(line.removeprefix(MARK))
            left = [name for name in left if name != entry["figure"]]
            yield entry
    stopped = not timer.is_alive()
    timer.cancel()
    if process.returncode != 0 and left:
        why = f"stopped after {seconds:.0f} s" if stopped else f"the process ended with status {process.returncode}"
        yield {"figure": left[0], "error": why}
