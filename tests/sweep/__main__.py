"""The command: `python -m tests.sweep [names] [options]`, which `make sweep` runs."""

import argparse
import logging
import os
import sys
import time
import warnings

# Read when the libraries are imported. A pool of threads does not survive a fork, and one thread is enough.
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "critical")

import torch

from tests.sweep import page
from tests.sweep.architectures import names as all_names
from tests.sweep.runner import sweep
from tests.sweep.stages import STAGES, examine

MARKS = {"passed": "ok  ", "failed": "FAIL", "no decoder": "-   ", "does not run": "--  "}


def main() -> int:
    options = _options()
    names = options.names or list(all_names())
    unknown = set(names) - set(all_names())
    if unknown:
        print(f"transformers maps no causal language model to {', '.join(sorted(unknown))}")
        return 2
    stages = tuple(stage for stage in STAGES if stage != "compile" or options.compile)
    _warm_up(stages)
    began, results = time.perf_counter(), []
    for result in sweep(names, stages, jobs=options.jobs, fresh=options.fresh):
        results.append(result)
        line = result["reason"] or ", ".join(f"{count} {op}" for op, count in page.parts(result).items())
        print(f"[{len(results)}/{len(names)}] {MARKS[result['status']]} {result['name']}: {line[:200]}", flush=True)
    print(f"\n{page.summary(results)}\nin {(time.perf_counter() - began) / 60:.1f} minutes")
    lost, gained = page.against_the_list(results)
    if gained:
        print(f"newly supported: {', '.join(gained)}")
    if lost:
        print(f"LOST: {', '.join(lost)}")
    if not options.names and options.write:
        page.write(results, stages, keep=lost)
        print(f"wrote {page.PAGE.relative_to(page.ROOT)} and {page.LIST.relative_to(page.ROOT)}")
    return 1 if lost else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make sweep", description="Every architecture through every stage.")
    parser.add_argument("names", nargs="*", help="model types; default: all that transformers maps to a causal LM")
    parser.add_argument(
        "--no-compile", dest="compile", action="store_false", help="leave out torch-compile, the longest"
    )
    parser.add_argument("--fresh", action="store_true", help="examine again what the code has not changed for")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time (default: 2)")
    parser.add_argument("--no-write", dest="write", action="store_false", help="leave page and list as they are")
    return parser.parse_args()


def _warm_up(stages: tuple[str, ...]) -> None:
    """Import and build what every child needs, once."""
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    examine("llama", stages)


if __name__ == "__main__":
    sys.exit(main())
