"""Models of real dimensions on one GPU, with random weights: our figures, transformers', the device's rates, targets.

    PYTHONPATH=src:. python benchmarks/gpu.py [--models llama-3.1-8b ...] [--figures single ...] [--record FILE]

Nothing is fetched, and nothing is needed but torch, triton, transformers and what these come with. Each model runs in a
process of its own. Figures are written as they are taken, so that a run that is killed keeps what it has; a run with
the same record goes on with what is missing. See `gpu/`; `--smoke` tries the script on tiny models.
"""

import argparse
import json
import platform
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from gpu import jobs, targets

from autodeploy.bench import record
from autodeploy.config import QUANTIZATIONS

LEAST_SECONDS = 30
"""left for a process, else it is not started"""


def _arguments(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=jobs.MODELS, default=jobs.MODELS)
    parser.add_argument("--figures", nargs="+", choices=jobs.FIGURES, default=jobs.FIGURES)
    parser.add_argument("--precisions", nargs="+", choices=jobs.PRECISIONS, default=jobs.PRECISIONS)
    parser.add_argument("--seconds", type=float, default=540, help="for all of it; what does not fit is left out")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/local"), help="folder of the record")
    parser.add_argument("--record", type=Path, help="a record to go on with")
    parser.add_argument("--smoke", action="store_true", help="tiny models; the figures mean nothing")
    return parser.parse_args(arguments)


def _line(entry: dict[str, Any]) -> str:
    """The numbers of an entry, those at its top."""
    shown = {name: value for name, value in entry.items() if isinstance(value, int | float)}
    text = entry.get("error") or ", ".join(f"{name} {value:.4g}" for name, value in shown.items())
    return f"{entry['model']} {entry['precision']} {entry['figure']}: {text}"


def main(arguments: list[str] | None = None) -> None:
    """Run what fits into the time, write the record, say what it has reached."""
    given = _arguments(arguments)
    if not torch.cuda.is_available() and not given.smoke:
        raise SystemExit("no CUDA device, and these models are made for one; --smoke tries the script with tiny ones")
    device = torch.cuda.get_device_name().replace(" ", "-") if torch.cuda.is_available() else "cpu"
    name = f"gpu_{platform.machine()}-{device}_{time.strftime('%Y%m%d-%H%M')}"
    path = given.record or given.output / f"{name}.json"
    entries: list[dict[str, Any]] = []
    if path.exists():
        entries = json.loads(path.read_text(encoding="utf-8"))["entries"]
    about = {"benchmark": "gpu", "smoke": given.smoke, "machine": record.machine(), "versions": record.versions()}
    precisions = [each for each in given.precisions if each == "bf16" or each in QUANTIZATIONS]
    path.parent.mkdir(parents=True, exist_ok=True)
    end = time.perf_counter() + given.seconds
    for job in jobs.jobs(given.models, given.figures, precisions, entries):
        left = end - time.perf_counter()
        if left < LEAST_SECONDS:
            print(f"left out for want of time: {job}", flush=True)
            continue
        print(f"{job} (at most {left:.0f} s)", flush=True)
        for entry in jobs.run(job, left, smoke=given.smoke, profiles=path.parent / f"{path.stem}-profiles"):
            entries.append({"time": datetime.now(UTC).isoformat(timespec="seconds"), **entry})
            path.write_text(json.dumps({**about, "entries": entries}, indent=1) + "\n", encoding="utf-8")
            print(_line(entry), flush=True)
    for target in () if given.smoke else targets.TARGETS:
        print(target.verdict(entries))
    for each in set(given.precisions) - set(precisions):
        print(f"{each}: not a quantization of this version")
    print(path)


if __name__ == "__main__":
    main()
