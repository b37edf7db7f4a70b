"""What the host does per step beside the model: schedule, metadata, sampling, commit, in microseconds.

A program that computes nothing stands in for the model, so that what is left is the runtime's own work.

    python benchmarks/host_cost.py [--sequences 1 8 64 256] [--steps 200] [--output benchmarks/results/local]

CPU time of the process with one thread, medians over steps of pure decoding; the logits are bfloat16, as those of most
checkpoints are, of `--vocab` tokens. `sample` is choosing tokens, `rest` all that is not named: reading tokens, commit,
outputs.
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import torch
from torch import Tensor

from autodeploy.bench import record
from autodeploy.compile.program import NamedGraph, Program
from autodeploy.config import EngineOptions
from autodeploy.kernels.beside import kernels_beside
from autodeploy.ops.state import PagedState
from autodeploy.runtime.batch import BatchBuilder
from autodeploy.runtime.engine import Engine
from autodeploy.runtime.request import SamplingParams
from autodeploy.runtime.sampler import Sampler
from autodeploy.runtime.scheduler import Scheduler

INPUTS = (
    "input_ids",
    "position_ids",
    "cu_seqlens",
    "seq_lens",
    "logits_indices",
    "page_table_full",
    "slot_mapping_full",
)
PARTS = {"schedule": (Scheduler, "schedule"), "metadata": (BatchBuilder, "build"), "sample": (Sampler, "choose")}
LOADS: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0.0},
    "top_p 0.9": {"temperature": 1.0, "top_p": 0.9},
    "top_k 50": {"temperature": 1.0, "top_k": 50},
}


def fake_program(vocab_size: int, num_rows: int) -> Program:
    """Reads no state and returns prepared logits."""
    logits = 4 * torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(0)).bfloat16()

    def run(*inputs: Tensor) -> Tensor:
        return logits[: inputs[INPUTS.index("logits_indices")].shape[0]]

    kernels = kernels_beside(vocab_size, torch.bfloat16, torch.device("cpu"))
    return Program(
        graphs={"text": NamedGraph("text", run, INPUTS, ("keys",))},
        states=[PagedState(name="keys", shape=(1,), dtype=torch.float32)],
        vocab_size=vocab_size,
        max_model_len=4096,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
        **{name: kernel.function for name, kernel in kernels.items()},
    )


@contextmanager
def timed(spent: dict[str, float]) -> Iterator[None]:
    """Adds up the CPU time spent in each of `PARTS`; for many steps, as changed classes slow the next calls down."""
    originals = {name: getattr(cls, method) for name, (cls, method) in PARTS.items()}

    def wrap(name: str) -> Callable[..., object]:
        def call(*args: object, **kwargs: object) -> object:
            began = time.process_time_ns()
            try:
                return originals[name](*args, **kwargs)
            finally:
                spent[name] += (time.process_time_ns() - began) / 1000

        return call

    for name, (cls, method) in PARTS.items():
        setattr(cls, method, wrap(name))
    try:
        yield
    finally:
        for name, (cls, method) in PARTS.items():
            setattr(cls, method, originals[name])


def measure(num_seqs: int, num_steps: int, vocab_size: int, params: dict[str, float]) -> dict[str, float]:
    """Microseconds of CPU time per step of `num_seqs` decoding sequences, by part."""
    options = EngineOptions(max_num_seqs=num_seqs, kv_cache_memory_bytes=2**28)
    engine = Engine(fake_program(vocab_size, num_seqs), options)
    for at in range(num_seqs):
        prompt = [(at + token) % vocab_size for token in range(100)]
        engine.add_request(str(at), prompt, SamplingParams(max_tokens=None, ignore_eos=True, seed=at, **params))
    while engine.stats().num_waiting or engine.stats().generation_tokens < 2 * num_seqs:
        engine.step()
    steps: list[dict[str, float]] = []
    spent: dict[str, float] = {}
    with timed(spent):
        for _ in range(num_steps):
            spent.update(dict.fromkeys(PARTS, 0.0))
            began = time.process_time_ns()
            engine.step()
            total = (time.process_time_ns() - began) / 1000
            steps.append({**spent, "rest": total - sum(spent.values()), "total": total})
    return {name: statistics.median(step[name] for step in steps) for name in steps[0]}


def main(arguments: list[str] | None = None) -> None:
    """Measure, print, and write a record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 8, 64, 256])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--vocab", type=int, default=49152)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/local"))
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results: dict[str, dict[str, dict[str, float]]] = {}
    for title, params in LOADS.items():
        print(f"{title}, vocabulary of {given.vocab}, microseconds of CPU time per step")
        results[title] = {}
        for num_seqs in given.sequences:
            parts = measure(num_seqs, given.steps, given.vocab, params)
            print(f"  {num_seqs:4d} sequences: " + ", ".join(f"{name} {value:.0f}" for name, value in parts.items()))
            results[title][str(num_seqs)] = parts
    raw = {
        "command": sys.argv,
        "vocabulary": given.vocab,
        "steps": given.steps,
        "machine": record.machine(),
        "versions": record.versions(),
        "microseconds": results,
    }
    given.output.mkdir(parents=True, exist_ok=True)
    path = given.output / f"host-cost_{platform.machine()}_{datetime.now(UTC):%Y%m%d-%H%M}.json"
    path.write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
