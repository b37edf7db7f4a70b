"""What capture and transforms cost at real dimensions: seed_models.yaml in, JSON and docs/seed-models.md out.

    python benchmarks/capture_cost.py [CONFIG ...] [--output benchmarks/results] [--page docs/seed-models.md]

Every config is captured and transformed in a process of its own, without weights (fake tensors), by one thread. Times
are CPU seconds beside wall seconds; memory is the process's peak, imports included. No number of the model is computed.
"""

import argparse
import json
import multiprocessing
import resource
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import seed_models_page
import torch
import yaml
from transformers import AutoConfig

from autodeploy.bench import record
from autodeploy.build import transform
from autodeploy.capture.export import capture
from autodeploy.checkpoint.load import weight_bytes
from autodeploy.config import CompileOptions
from autodeploy.graph.levels import Level
from autodeploy.graph.model_graph import ModelGraph
from autodeploy.graph.verify import verify
from autodeploy.models.instantiate import instantiate
from autodeploy.ops.state import PagedState, SlotState

DATA = Path(__file__).parent / "seed_models.yaml"
TIMEOUT_SECONDS = 600


def measure(fields: dict[str, Any]) -> dict[str, Any]:
    """Capture and transform one config; seconds, counts and memory as JSON values."""
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    clocks = time.process_time(), time.perf_counter()

    def lap(name: str) -> None:
        nonlocal clocks
        now = time.process_time(), time.perf_counter()
        found[name] = {"cpu": round(now[0] - clocks[0], 2), "wall": round(now[1] - clocks[1], 2)}
        clocks = now

    fields = dict(fields)
    model = instantiate(AutoConfig.for_model(fields.pop("type"), **fields), dtype=torch.bfloat16)
    lap("instantiate")
    graph = capture(model)
    verify(graph, Level.CAPTURED)
    found |= {"captured_nodes": len(graph.graph.nodes), "layers": graph.repetition}
    lap("capture")
    report = transform(graph, CompileOptions(), torch.device("cpu"))
    lap("transform")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    rewrites = {name: count for name, count in report.rewrites().items() if count}
    return found | plan(graph) | {"rewrites": rewrites, "peak_rss_bytes": peak}


def plan(graph: ModelGraph) -> dict[str, Any]:
    """Nodes of the lowered graph, its token mixers, and the memory that it will need."""
    mixers = Counter(op.name for _, op in graph.op_nodes() if op.is_cached)
    return {
        "lowered_nodes": len(graph.graph.nodes),
        "mixers": dict(mixers),
        "weight_bytes": sum(weight_bytes(recipe) for recipe in graph.weights.values()),
        "bytes_per_token": sum(spec.bytes_per_token for spec in graph.states if isinstance(spec, PagedState)),
        "bytes_per_sequence": sum(spec.bytes_per_slot for spec in graph.states if isinstance(spec, SlotState)),
    }


def _child(fields: dict[str, Any], pipe: Any) -> None:
    try:
        pipe.send(measure(fields))
    except Exception as error:  # a result like any other: the table says what stands in the way
        pipe.send({"error": f"{type(error).__name__}: {error}"[:600]})


def in_a_process(fields: dict[str, Any]) -> dict[str, Any]:
    """`measure`, forked from here, so that a peak is of one config and imports are not repeated."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(fields, send))
    process.start()
    answered = receive.poll(TIMEOUT_SECONDS)
    result: dict[str, Any] = receive.recv() if answered else {"error": f"no answer within {TIMEOUT_SECONDS} s"}
    process.kill()
    process.join()
    return result


def main() -> None:
    """Measure the configs asked for, all by default; the page is written only for all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*")
    parser.add_argument("--page", type=Path, help="write the table of all configs to this file")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/local"))
    given = parser.parse_args()
    data = yaml.safe_load(DATA.read_text(encoding="utf-8"))
    results = {}
    for name in given.configs or data["configs"]:
        results[name] = result = in_a_process(data["configs"][name])
        print(
            name,
            result.get("error") or {k: result[k] for k in ("capture", "transform", "peak_rss_bytes", "layers")},
            flush=True,
        )
    machine, stamp = record.machine(), time.strftime("%Y%m%d-%H%M")
    raw = {"command": sys.argv, "machine": machine, "versions": record.versions(), "results": results}
    given.output.mkdir(parents=True, exist_ok=True)
    path = given.output / f"capture-cost_{stamp}.json"
    path.write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")
    if given.page:
        given.page.write_text(seed_models_page.page(data["models"], raw), encoding="utf-8")


if __name__ == "__main__":
    main()
