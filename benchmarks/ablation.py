"""What each fusion and each native kernel is worth: a model goes in, ratios with and without it come out, as JSON.

    python benchmarks/ablation.py smollm2 --rounds 5 --output benchmarks/results

Each is switched off by a public option and measured in turns with the default (with, without, with, without, ...), so
that every pair shares the machine's mood. A ratio above 1 is what the build gains from it. What changes several ops at
once (a fusion that makes room for a kernel) counts with all it brings, so ratios do not multiply up to that of
everything off. Last, the default backend is exchanged for `torch-compile`, with native kernels and without.
"""

import argparse
import dataclasses
import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peers import models
from peers.conditions import conditions

from autodeploy.bench import record
from autodeploy.bench.latency import one_request, random_prompt
from autodeploy.build import build
from autodeploy.config import parse_options
from autodeploy.ops.op import REFERENCE
from autodeploy.runtime.engine import Engine
from autodeploy.transforms.pipeline import default_pipeline

SLOW_SECONDS = 20.0
SMOKE = ["fuse_qkv", "kernel rms_norm"]
Switch = Mapping[str, Any]
"""Options that switch something off."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """Tokens: prompt and answer of a decode run, prompt of a prefill run; and rounds."""

    decode: tuple[int, int] = (128, 64)
    prefill: int = 1024
    rounds: int = 5


def load_engine(folder: str, precision: str, switch: Switch) -> Engine:
    """An engine with something switched off, with memory for one long request."""
    quantization = None if precision == "bf16" else precision
    lean = {"graph_cache": False, "check_isolation": False, "kv_cache_memory_bytes": 2**28}
    options = parse_options({"quantization": quantization, **switch} | lean)
    return Engine(build(folder, options), options.engine)


def switches(engine: Engine) -> dict[str, Switch]:
    """What can be switched off in the default build, or exchanged for Inductor, and the options that do it."""
    report = engine.program.report
    fusions = [transform.name() for transform in _fusions() if report.rewrites().get(transform.name())]
    kernels = [name for name, chosen in sorted(report.kernels.items()) if set(chosen) - {REFERENCE}]
    no_kernels = {"select_kernels": {"without": tuple(kernels)}}
    transforms = (
        {name: {name: {"enabled": False}} for name in fusions}
        | {f"kernel {name}": {"select_kernels": {"without": (name,)}} for name in kernels}
        | {"kernels": no_kernels, "all of them": {name: {"enabled": False} for name in fusions} | no_kernels}
    )
    return {name: {"transforms": value} for name, value in transforms.items()} | {
        "replay": {"compile_backend": "torch-simple"},
        "replay, for Inductor": {"compile_backend": "torch-compile"},
        "replay and kernels, for Inductor": {"compile_backend": "torch-compile", "transforms": no_kernels},
    }


def _fusions() -> list[Any]:
    stages = default_pipeline(torch.device("cpu")).stages
    return [transform for stage in stages if stage.name == "fuse" for transform in stage.transforms]


def figures(engine: Engine, load: Load, seed: int) -> dict[str, float]:
    """Tokens per second of one decode and one prefill run, with prompts that no other turn has."""
    vocabulary = engine.program.vocab_size
    decode = one_request(engine, "decode", random_prompt(vocabulary, load.decode[0], 2 * seed), load.decode[1])
    prefill = one_request(engine, "prefill", random_prompt(vocabulary, load.prefill, 2 * seed + 1), 1)
    return {"decode": (len(decode) - 1) / (decode[-1] - decode[0]), "prefill": load.prefill / prefill[0]}


def compare(folder: str, precision: str, load: Load, chosen: list[str] | None) -> dict[str, dict[str, list[Any]]]:
    """Switch -> figure -> pairs [with, without], one per round after one that is not counted.

    Where a turn takes `SLOW_SECONDS`, as some references do, the first one counts and is the only one.
    """
    default = load_engine(folder, precision, {})
    pairs: dict[str, dict[str, list[Any]]] = {}
    for name, switch in switches(default).items():
        if chosen and name not in chosen:
            continue
        other = load_engine(folder, precision, switch)
        pairs[name] = {"decode": [], "prefill": []}
        for turn in range(load.rounds + 1):
            start = time.perf_counter()
            found = [figures(engine, load, turn) for engine in (default, other)]
            is_slow = time.perf_counter() - start > SLOW_SECONDS
            for figure, values in pairs[name].items() if turn or is_slow else ():
                values.append([each[figure] for each in found])
            if is_slow:
                break
        print(name, ratios(pairs[name]), flush=True)
    return pairs


def ratios(figures: dict[str, list[Any]]) -> dict[str, float]:
    """Figure -> median over the rounds of the rate with, over the rate without."""
    return {figure: round(statistics.median(w / wo for w, wo in values), 3) for figure, values in figures.items()}


def main(arguments: list[str] | None = None) -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2", help=f"of {', '.join(models.NAMES)}, or a folder")
    parser.add_argument("--precision", choices=("bf16", "int8", "int4"), default="bf16")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="+", help="names of switches, as printed")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, one round, seconds")
    parser.add_argument("--build", type=Path, default=Path(__file__).parents[1] / "build" / "peers")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/local"))
    given = parser.parse_args(arguments)
    load = Load(decode=(8, 4), prefill=16, rounds=1) if given.smoke else Load(rounds=given.rounds)
    seconds = 0.1 if given.smoke else 3.0
    before = conditions(seconds)
    name, only = ("tiny", SMOKE) if given.smoke else (given.model, given.only)
    with tempfile.TemporaryDirectory() as scratch:
        folder = str(models.folder(Path(scratch) if given.smoke else given.build.resolve(), name))
        pairs = compare(folder, given.precision, load, only)
    after = conditions(seconds)
    raw = {
        "benchmark": "ablation",
        "command": sys.argv,
        "model": name,
        "load": dataclasses.asdict(load),
        "limits": [before, after],
        "precisions": {
            given.precision: {"ratios": {name: ratios(each) for name, each in pairs.items()}, "samples": pairs}
        },
        "machine": record.machine(),
        "versions": record.versions(),
    }
    given.output.mkdir(parents=True, exist_ok=True)
    path = given.output / f"ablation-{name}-{given.precision}_{platform.machine()}_{time.strftime('%Y%m%d-%H%M')}.json"
    path.write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
