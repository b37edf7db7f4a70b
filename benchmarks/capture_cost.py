"""What capture and transforms cost at real dimensions: seed_models.yaml in, JSON and docs/seed-models.md out.

    PYTHONPATH=src:. python benchmarks/capture_cost.py [CONFIG ...] [--output benchmarks/results] [--page FILE]

Every config is captured and transformed in a process of its own, without weights (fake tensors), by one thread. Times
are CPU seconds beside wall seconds; memory is the process's peak, imports included. Each is held to a target. In a
second process a tiny model of the same config is built, served and compared with its own code, once for configs whose
tiny models are the same.
"""

import argparse
import json
import multiprocessing
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import seed_models_page
import torch

from autodeploy.bench import record
from autodeploy.build import transform
from autodeploy.capture.export import capture
from autodeploy.checkpoint.load import weight_bytes
from autodeploy.config import CompileOptions, EngineOptions
from autodeploy.graph.levels import Level
from autodeploy.graph.model_graph import ModelGraph
from autodeploy.graph.verify import verify
from autodeploy.ops.state import PagedState, SlotState, StateSpec
from autodeploy.runtime.pages import PageGroup
from tests import seed_models

TIMEOUT_SECONDS = 600
SECONDS, SECONDS_WITH_EXPERTS = 10, 30
"""targets: CPU time of capture and transforms for a model of any depth, without and with experts"""
PEAK_BYTES = 4e9
"""target: memory of the process"""
NUM_SEQUENCES, NUM_TOKENS = 32, 4096
"""load whose states the memory plan adds up"""


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

    model = seed_models.without_weights(fields)
    found["parameters"] = sum(parameter.numel() for parameter in model.parameters())
    lap("instantiate")
    graph = capture(model)
    verify(graph, Level.CAPTURED)
    found |= {"captured_nodes": len(graph.graph.nodes), "layers": graph.repetition}
    lap("capture")
    report = transform(graph, CompileOptions(), torch.device("cpu"))
    lap("transform")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    rewrites = {name: count for name, count in report.rewrites().items() if count}
    target = SECONDS_WITH_EXPERTS if any(op.name == "moe" for _, op in graph.op_nodes()) else SECONDS
    spent = found["capture"]["cpu"] + found["transform"]["cpu"]
    verdict = {"target_seconds": target, "within_target": spent < target and peak < PEAK_BYTES}
    return found | plan(graph) | verdict | {"rewrites": rewrites, "peak_rss_bytes": peak}


def plan(graph: ModelGraph) -> dict[str, Any]:
    """Nodes of the lowered graph, its token mixers, and the memory that it will need."""
    mixers = Counter(op.name for _, op in graph.op_nodes() if op.is_cached)
    return {
        "lowered_nodes": len(graph.graph.nodes),
        "mixers": dict(mixers),
        "weight_bytes": sum(weight_bytes(recipe) for recipe in graph.weights.values()),
        "bytes_per_token": sum(spec.bytes_per_token for spec in graph.states if isinstance(spec, PagedState)),
        "bytes_per_sequence": sum(spec.bytes_per_slot for spec in graph.states if isinstance(spec, SlotState)),
        "bytes_of_load": NUM_SEQUENCES * sum(map(_bytes_of_sequence, graph.states)),
    }


def _bytes_of_sequence(spec: StateSpec) -> int:
    """State of one sequence of `NUM_TOKENS`, in whole pages; a window keeps only the pages it reaches."""
    if isinstance(spec, SlotState):
        return spec.bytes_per_slot
    page_size = EngineOptions().page_size
    pages = PageGroup(name=spec.group, num_pages=0, window=spec.window).max_pages(NUM_TOKENS, page_size)
    return pages * page_size * spec.bytes_per_token


def numbers(fields: dict[str, Any]) -> dict[str, Any]:
    """Hold a tiny model of a config to its own code."""
    torch.set_num_threads(1)
    return {"numbers": seed_models.numbers(seed_models.tiny(fields))}


def _child(work: Callable[[dict[str, Any]], dict[str, Any]], fields: dict[str, Any], pipe: Any) -> None:
    try:
        pipe.send(work(fields))
    except Exception as error:  # a result like any other: the table says what stands in the way
        pipe.send({"error": f"{type(error).__name__}: {error}"[:600]})


def in_a_process(work: Callable[[dict[str, Any]], dict[str, Any]], fields: dict[str, Any]) -> dict[str, Any]:
    """`work(fields)`, forked from here, so that a peak is of one config and imports are not repeated."""
    context = multiprocessing.get_context("fork")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(work, fields, send))
    process.start()
    answered = receive.poll(TIMEOUT_SECONDS)
    result: dict[str, Any] = receive.recv() if answered else {"error": f"no answer within {TIMEOUT_SECONDS} s"}
    process.kill()
    process.join()
    return result


def _line(result: dict[str, Any]) -> str:
    if "error" in result:
        return f"REFUSED: {result['error']}; numbers {result['numbers']}"
    spent = result["capture"]["cpu"] + result["transform"]["cpu"]
    peak = f"{result['peak_rss_bytes'] / 1e9:.2f} GB"
    verdict = f"{'within' if result['within_target'] else 'OVER'} {result['target_seconds']} s"
    return f"{spent:.1f} s, {peak}: {verdict}; {result['layers']}; numbers {result['numbers']}"


def main() -> None:
    """Measure the configs asked for, all by default; the page is written only for all of them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("configs", nargs="*")
    parser.add_argument("--page", type=Path, help="write the table of all configs to this file")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/local"))
    given = parser.parse_args()
    data = seed_models.DATA
    results: dict[str, dict[str, Any]] = {}
    raw = {"command": sys.argv, "machine": record.machine(), "versions": record.versions(), "results": results}
    given.output.mkdir(parents=True, exist_ok=True)
    path = given.output / f"capture-cost_{time.strftime('%Y%m%d-%H%M')}.json"
    tiny_results: dict[str, dict[str, Any]] = {}
    for name in given.configs or data["configs"]:
        fields = data["configs"][name]
        results[name] = result = in_a_process(measure, fields)
        result["published_parameters"] = data["parameters"][name]
        key = seed_models.tiny_key(fields)
        if key not in tiny_results:
            tiny_results[key] = in_a_process(numbers, fields)
        result["numbers"] = tiny_results[key].get("numbers") or f"wrong: {tiny_results[key]['error']}"
        print(name, _line(result), flush=True)
        path.write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")  # now, so that nothing measured is lost
    over = [name for name, result in results.items() if not result.get("within_target")]
    wrong = [name for name, result in results.items() if result["numbers"].startswith("wrong")]
    print(f"targets: {len(results) - len(over)} of {len(results)} within; over or refused: {over or 'none'}")
    print(f"numbers: {len(results) - len(wrong)} of {len(results)} right; wrong: {wrong or 'none'}")
    if given.page:
        given.page.write_text(seed_models_page.page(data["models"], raw), encoding="utf-8")


if __name__ == "__main__":
    main()
