"""The seeds' models at their real dimensions, as data: all are listed, and two are captured within their limits."""

import runpy
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig

from autodeploy.build import transform
from autodeploy.capture.export import capture
from autodeploy.config import CompileOptions
from autodeploy.debug.shrink import shrink
from autodeploy.graph.model_graph import ModelGraph
from autodeploy.graph.report import BuildReport
from autodeploy.models.instantiate import instantiate

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
DATA: dict[str, Any] = yaml.safe_load((BENCHMARKS / "seed_models.yaml").read_text(encoding="utf-8"))
ELSEWHERE = "not in transformers"


def _config(name: str) -> Any:
    fields = dict(DATA["configs"][name])
    return AutoConfig.for_model(fields.pop("type"), **fields)


def _lowered(config: Any) -> tuple[ModelGraph, BuildReport]:
    graph = capture(instantiate(config, dtype=torch.bfloat16))
    return graph, transform(graph, CompileOptions(), torch.device("cpu"))


def test_every_model_has_a_configuration_and_every_configuration_a_model() -> None:
    used = set(DATA["models"].values()) - {ELSEWHERE}
    assert used == set(DATA["configs"])
    assert len(DATA["models"]) >= 67 + 8


# CPU seconds of capture and transforms together, several times what a quiet machine takes; a trace of every layer takes
# more than twice the limit.
@pytest.mark.parametrize(
    ("name", "layers", "mixers", "seconds"),
    [("llama-3.1-8b", 29, 32, 10.0), ("qwen3-30b-a3b", 45, 48, 30.0)],
)
def test_real_dimensions_within_their_limits(name: str, layers: int, mixers: int, seconds: float) -> None:
    start = time.process_time()
    graph, report = _lowered(_config(name))
    assert time.process_time() - start < seconds
    assert graph.repetition.startswith(f"{layers} of ")
    assert report.rewrites()["insert_cached_ops"] == mixers
    assert all(parameter.is_meta for parameter in graph.module.parameters())


def test_nodes_do_not_grow_with_experts() -> None:
    config = shrink(_config("qwen3-30b-a3b"))
    nodes = []
    for experts in (8, 128):
        config.num_experts = config.num_local_experts = experts
        nodes.append(len(_lowered(config)[0].graph.nodes))
    assert nodes[0] == nodes[1]


def test_page_lists_every_model_and_says_what_was_refused() -> None:
    page = runpy.run_path(str(BENCHMARKS / "seed_models_page.py"))["page"]
    seconds = {"cpu": 1.0, "wall": 2.0}
    good = {"capture": seconds, "transform": seconds, "peak_rss_bytes": 3e8, "captured_nodes": 9, "lowered_nodes": 8}
    good |= {"mixers": {"cached_attention": 2}, "weight_bytes": 2e9, "bytes_per_token": 4096, "bytes_per_sequence": 0}
    good |= {"layers": "1 of 4", "rewrites": {"match_linear": 3}}
    machine = {"cpu": "a CPU", "threads": 2, "load_average": [1.0]}
    results = {"small": good, "odd": {"error": "GraphLevelError: it mixes tokens"}}
    text = page({"a/small-FP8": "small", "b/odd": "odd"}, {"machine": machine, "versions": {}, "results": results})
    assert (
        "1 of 2 configurations" in text
        and "| small | 1.0 | 1.0 | 0.30 | 9 | 8 | 2 cached_attention | 2.0 | 4,096 | 0 |" in text
    )
    assert "- odd: GraphLevelError: it mixes tokens" in text
    assert "| a/small-FP8 | small (FP8 not executed) |" in text and "| b/odd | odd (refused) |" in text


@pytest.mark.slow
@pytest.mark.parametrize("name", DATA["configs"])
def test_every_configuration_reaches_a_lowered_graph(name: str) -> None:
    graph, report = _lowered(_config(name))
    assert report.rewrites()["insert_cached_ops"] > 0 and graph.states
