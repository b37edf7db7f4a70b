"""One interleaved run of AutoDeploy and transformers on one model: decode and prefill, as markdown and JSON.

    python benchmarks/compare_transformers.py smollm2 --rounds 5 --output benchmarks/results

The subjects take turns (A B C D A B C D ...), because a shared machine changes its speed by the minute. Each round has
prompts of its own. A GGUF file is transcribed before anything is timed, so that all subjects read the same folder. How
long a start takes is measured by `starts.py`.
"""

import argparse
import dataclasses
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from peers.subjects import vocab_size

from autodeploy.bench import record, reference
from autodeploy.bench.latency import one_request, random_prompt
from autodeploy.bench.machine import measure
from autodeploy.build import build
from autodeploy.config import parse_options
from autodeploy.models.resolve import resolve_model
from autodeploy.packaged_models import DEFAULT, model_path
from autodeploy.runtime.engine import Engine

SMOKE = ("autodeploy torch-simple", "transformers eager")
Generate = Callable[[list[int], int], tuple[float, float]]


def load_autodeploy(folder: str, backend: str) -> Generate:
    """Ours: seconds to the first token and tokens per second after it."""
    options = parse_options({"compile_backend": backend})
    engine = Engine(build(folder, options), options.engine)

    def generate(prompt: list[int], num_tokens: int) -> tuple[float, float]:
        times = one_request(engine, "request", prompt, num_tokens)
        return times[0], (num_tokens - 1) / max(times[-1] - times[0], 1e-9)

    return generate


def load_transformers(folder: str, compiled: bool) -> Generate:
    """Theirs, with the default cache or with the static cache and compiled forward.

    A static cache stays as long as the longest request there was, and each step attends to all of it; so each length
    of prompt has a model of its own, with a cache of its own size.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    arguments = reference.compiled_static_cache() if compiled else {}
    models: dict[int, Any] = {}

    def generate(prompt: list[int], num_tokens: int) -> tuple[float, float]:
        key = len(prompt) if compiled else 0
        if key not in models:
            models[key] = reference.load(folder, parse_options({}).model, device)
        timing = reference.generate(models[key], prompt, num_tokens, **arguments)
        return timing.first_token_seconds, (num_tokens - 1) / max(timing.decode_seconds, 1e-9)

    return generate


SUBJECTS: dict[str, Callable[[str], Generate]] = {
    "autodeploy torch-simple": lambda folder: load_autodeploy(folder, "torch-simple"),
    "autodeploy torch-compile": lambda folder: load_autodeploy(folder, "torch-compile"),
    "transformers eager": lambda folder: load_transformers(folder, compiled=False),
    "transformers static compiled": lambda folder: load_transformers(folder, compiled=True),
}


def steady_state(
    folder: str, names: Sequence[str], rounds: int, lengths: tuple[int, int, int]
) -> dict[str, dict[str, list[float]]]:
    """Raw samples per subject, taken in turns after one round that is not counted.

    Args:
        folder: the checkpoint.
        names: of `SUBJECTS`.
        rounds: those that are counted.
        lengths: tokens of the prompt and the answer of a decode run, and of a prompt to prefill.
    """
    subjects = {name: SUBJECTS[name](folder) for name in names}
    vocabulary = min(vocab_size(Path(folder)), 8192)
    input_len, output_len, prefill_len = lengths
    samples: dict[str, dict[str, list[float]]] = {name: {"decode": [], "prefill": []} for name in subjects}
    for turn in range(rounds + 1):
        for name, generate in subjects.items():
            _, decode = generate(random_prompt(vocabulary, input_len, 2 * turn), output_len)
            first, _ = generate(random_prompt(vocabulary, prefill_len, 2 * turn + 1), 2)
            prefill = prefill_len / first
            print(f"round {turn}: {name}: decode {decode:.1f} tok/s, prefill {prefill:.0f} tok/s", flush=True)
            if turn:
                samples[name]["decode"].append(decode)
                samples[name]["prefill"].append(prefill)
    return samples


def markdown(samples: dict[str, dict[str, list[float]]]) -> str:
    """Medians with their range, and ratios to transformers eager."""
    base = {kind: statistics.median(values) for kind, values in samples["transformers eager"].items()}
    rows = [
        "| | decode, tok/s | ratio | prefill 1,024, tok/s | ratio |",
        "|---|---|---|---|---|",
    ]
    for name, kinds in samples.items():
        cells = [name]
        for kind, values in kinds.items():
            middle = statistics.median(values)
            cells += [f"{middle:.1f} [{min(values):.1f}-{max(values):.1f}]", f"{middle / base[kind]:.2f}"]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Run everything and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default=DEFAULT)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output-len", type=int, default=64)
    parser.add_argument("--smoke", action="store_true", help="two subjects, one round of few tokens")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/local"))
    given = parser.parse_args(arguments)
    resolved = resolve_model(model_path(given.model), parse_options({}).model)
    if given.smoke:
        samples = steady_state(str(resolved.folder), SMOKE, 1, (8, 4, 16))
    else:
        samples = steady_state(str(resolved.folder), list(SUBJECTS), given.rounds, (128, given.output_len, 1024))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    facts = {"limits": dataclasses.asdict(measure(device, resolved.dtype)), "machine": record.machine()}
    table = markdown(samples)
    name = f"compare-transformers_{platform.machine()}-{device.type}_{time.strftime('%Y%m%d-%H%M')}"
    given.output.mkdir(parents=True, exist_ok=True)
    raw = {"command": sys.argv, "samples": samples, "versions": record.versions(), **facts}
    (given.output / f"{name}.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")
    conditions = f"`{' '.join(sys.argv)}`, {resolved.dtype}, {facts}, {record.versions()}"
    (given.output / f"{name}.md").write_text(f"{table}\n{conditions}\n", encoding="utf-8")
    print(table)


if __name__ == "__main__":
    main()
