"""AutoDeploy beside its peers on one model, in turns, as JSON and a table: how fast, how soon, in how much memory.

    python benchmarks/peers.py smollm2 --output benchmarks/results
    python benchmarks/peers.py qwen3-0.6b --precision int4 --peer AutoDeploy llama.cpp
    python benchmarks/peers.py llama-3.2-1b --rounds 1 --requests 4 --prefill 1024      # a smaller load
    python benchmarks/peers.py --prepare        # environments and model files of every model, nothing measured

Subjects of one precision take turns at each figure (A B C A B C ...), after a round that is not counted; every prompt
is random and used once. Before that they take turns at starting: a start is a process of its own, from launch to the
first token after 128. The machine's limits are measured in every round, and how busy others keep it: speed is
meaningful on an idle machine only, and `performance_page.py` takes no record of a busy one.
"""

import argparse
import signal
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from peers import environments, models, records
from peers.conditions import conditions
from peers.rounds import SMOKE, Load, Rounds
from peers.subjects import KINDS, Subject, prepare, vocab_size
from peers.summary import agreement

PRECISIONS = ("bf16", "int8", "int4")
REFERENCE = "transformers"
PREFILLS = Load.prefill


def subjects_of(given: argparse.Namespace, model: str, build: Path) -> tuple[list[Subject], dict[str, str]]:
    """What can run here, and why the rest cannot."""
    ready, missing = [], {}
    checkpoint = models.folder(build, model)
    for precision in given.precision:
        for name in given.peer:
            try:
                ready.append(prepare(name, precision, model, checkpoint, build))
            except environments.NotAvailable as reason:
                missing[f"{name} {precision}"] = str(reason)
                print(f"not available: {name} {precision}: {reason}", flush=True)
    return ready, missing


def compare(subjects: list[Subject], load: Load, num_ids: int, rounds: int, limits: list[Any]) -> dict[str, Any]:
    """Samples of subjects of one precision; the machine's limits in each round are added to `limits`."""
    seconds = 3.0 if load is not SMOKE else 0.1
    with ExitStack() as stack:
        runs = Rounds(load, num_ids)
        runs.start(subjects, 1 if load is SMOKE else rounds + 1, stack)
        for turn in range(rounds + 1):
            limits.append(conditions(seconds))
            print(f"-- {subjects[0].precision}, round {turn} of {rounds}", flush=True)
            runs.once(counted=turn > 0)
        facts = runs.end()
    return {"samples": runs.samples, "failed": runs.failed, "facts": facts, "tokens": runs.tokens}


def run(given: argparse.Namespace, model: str, build: Path) -> Path | None:
    """Compare on one model and write the record; returns its path, None where nothing was to be measured."""
    subjects, missing = subjects_of(given, model, build)
    if given.prepare:
        return None
    num_ids = min(vocab_size(models.folder(build, model)), 8192)
    load = SMOKE if given.smoke else Load(num_requests=given.requests, prefill=tuple(given.prefill))
    limits: list[Any] = []
    groups: dict[str, Any] = {}
    for precision in given.precision:
        if chosen := [subject for subject in subjects if subject.precision == precision]:
            groups[precision] = compare(chosen, load, num_ids, given.rounds, limits)
    tokens = {precision: group.pop("tokens") for precision, group in groups.items()}
    reference = tokens.get("bf16", {}).get(REFERENCE)
    for precision, group in groups.items() if reference else ():
        group["agreement"] = {name: agreement(own, reference) for name, own in tokens[precision].items()}
    used = {KINDS[subject.name].environment for subject in subjects} - {None}
    path = records.write(given.output, "peers", model, load, limits, groups, missing, sorted(map(str, used)), build)
    print("\n".join(table(groups)))
    return path


def table(groups: dict[str, Any]) -> list[str]:
    """Medians, as text."""
    lines = []
    for precision, group in groups.items():
        for name, figures in group["samples"].items():
            medians = {key: statistics.median(values) for key, values in figures.items() if values}
            lines.append(f"{precision} {name}: " + ", ".join(f"{key} {value:.5g}" for key, value in medians.items()))
        lines += [f"{precision} {name}: failed: {reason}" for name, reason in group["failed"].items()]
    return lines


def main(arguments: list[str] | None = None) -> None:
    """Compare on the models that are named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help=f"of {', '.join(models.NAMES)}, or a checkpoint folder")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--peer", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--requests", type=int, default=Load.num_requests, help="how many at once")
    parser.add_argument("--prefill", type=int, nargs="+", choices=PREFILLS, default=list(PREFILLS), help="tokens")
    parser.add_argument("--prepare", action="store_true", help="make what is missing and measure nothing")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, no peers that need an environment, seconds")
    parser.add_argument("--build", type=Path, default=Path(__file__).parents[1] / "build" / "peers")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/local"))
    given = parser.parse_args(arguments)
    if given.smoke:
        given.models, given.rounds, given.precision, given.peer = ["tiny"], 1, ["bf16"], ["AutoDeploy", REFERENCE]
    every = [name for name in models.NAMES if name not in models.FOR_CHECKS]
    with tempfile.TemporaryDirectory() as scratch:
        for model in given.models or (every if given.prepare else ["smollm2"]):
            run(given, model, Path(scratch) if given.smoke else given.build.resolve())


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no peer is left behind, standing still
    main()
