"""The seeds' models as data: all are listed, sizes are those of their names, some are captured and some served."""

import importlib
import time
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from autodeploy.build import build, transform
from autodeploy.capture.export import capture
from autodeploy.config import CompileOptions, EngineOptions
from autodeploy.graph.model_graph import ModelGraph
from autodeploy.graph.report import BuildReport
from autodeploy.ops.state import PagedState, SlotState
from tests import seed_models
from tests.seed_models import BENCHMARKS, DATA
from tests.sweep.stages import Mismatch

CONFIGS: dict[str, Any] = DATA["configs"]
COUNTED = ("llama-3.2-1b", "gpt-oss-20b", "openelm-270m", "nemotron-51b", "nemotron-ultra-253b", "nemotron-flash-1b")
SERVED = ("openelm-270m", "nemotron-51b", "llama-3.2-1b")


def _lowered(model: nn.Module) -> tuple[ModelGraph, BuildReport]:
    graph = capture(model)
    return graph, transform(graph, CompileOptions(), torch.device("cpu"))


def _benchmark(name: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module(name)


def test_every_model_has_a_configuration_and_every_configuration_a_model() -> None:
    assert set(DATA["models"].values()) == set(CONFIGS) == set(DATA["parameters"])
    assert len(DATA["models"]) >= 67 + 8


def _has_its_size(name: str) -> bool:
    """Within 5 %: names and cards round, and some leave out the embedding's padding."""
    count = sum(parameter.numel() for parameter in seed_models.without_weights(CONFIGS[name]).parameters())
    return abs(count / 1e9 / DATA["parameters"][name] - 1) < 0.05


@pytest.mark.parametrize("name", COUNTED)
def test_has_the_parameters_that_its_card_says(name: str) -> None:
    assert _has_its_size(name)


@pytest.mark.parametrize("name", SERVED)
def test_tiny_model_is_served_as_its_own_code_computes(name: str) -> None:
    assert "preemptions" in seed_models.numbers(seed_models.tiny(CONFIGS[name]))


def test_other_weights_than_the_models_are_a_mismatch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, other = (seed_models.tiny(CONFIGS["nemotron-51b"]) for _ in range(2))
    other.get_parameter("blocks.0.body.out.weight").mul_(1.01)
    monkeypatch.setattr(seed_models, "build", lambda model, options: build(other, options))
    with pytest.raises(Mismatch, match="logits differ"):
        seed_models.numbers(model)


def test_tiny_models_keep_the_kinds_of_layers() -> None:
    def kinds(name: str) -> int:
        return len({tuple(kinds) for _, *kinds in CONFIGS[name]["layers"]})

    for name in ("nemotron-51b", "nemotron-super-49b", "nemotron-ultra-253b"):
        assert len(seed_models.tiny(CONFIGS[name]).blocks) == 2 * kinds(name)
    assert [sum(count for count, *_ in CONFIGS[n]["layers"]) for n in ("nemotron-51b", "nemotron-ultra-253b")] == [
        80,
        162,
    ]
    bodies = [type(block.body).__name__ for block in seed_models.tiny(CONFIGS["nemotron-flash-1b"]).blocks]
    assert {"DeltaNet", "Mamba2", "Attention", "Gated"} == set(bodies)


# CPU seconds of capture and transforms together, several times what a quiet machine takes; a trace of every layer takes
# more than twice the limit.
@pytest.mark.parametrize(
    ("name", "layers", "mixers", "seconds"),
    [("llama-3.1-8b", 29, 32, 10.0), ("qwen3-30b-a3b", 45, 48, 30.0), ("nemotron-super-49b", 138, 49, 10.0)],
)
def test_real_dimensions_within_their_limits(name: str, layers: int, mixers: int, seconds: float) -> None:
    start = time.process_time()
    graph, report = _lowered(seed_models.without_weights(CONFIGS[name]))
    assert time.process_time() - start < seconds
    assert graph.repetition.startswith(f"{layers} of ")
    assert report.rewrites()["insert_cached_ops"] == mixers
    assert all(parameter.is_meta for parameter in graph.module.parameters())


def test_nodes_do_not_grow_with_experts() -> None:
    fields = CONFIGS["qwen3-30b-a3b"] | {"num_hidden_layers": 2, "hidden_size": 64, "vocab_size": 256}
    few, many = (_lowered(seed_models.without_weights(fields | {"num_experts": count}))[0] for count in (8, 128))
    assert len(few.graph.nodes) == len(many.graph.nodes)


def test_state_of_a_load_counts_windows_and_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    bytes_of = _benchmark("capture_cost", monkeypatch)._bytes_of_sequence
    full = PagedState(name="full", shape=(2, 8), dtype=torch.bfloat16)
    assert bytes_of(full) == 4096 * 32
    window = bytes_of(PagedState(name="window", shape=(2, 8), dtype=torch.bfloat16, window=512))
    assert 512 * 32 <= window <= (512 + 2 * EngineOptions().page_size) * 32
    assert bytes_of(SlotState(name="slot", shape=(3,), dtype=torch.float32)) == 12


def test_page_lists_every_model_and_says_what_was_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    page = _benchmark("seed_models_page", monkeypatch).page
    seconds = {"cpu": 1.0, "wall": 2.0}
    good = {"capture": seconds, "transform": seconds, "peak_rss_bytes": 3e8, "captured_nodes": 9, "lowered_nodes": 8}
    good |= {"mixers": {"cached_attention": 2}, "weight_bytes": 2e9, "bytes_per_token": 4096, "bytes_per_sequence": 0}
    good |= {"layers": "1 of 4", "rewrites": {"match_linear": 3}, "parameters": 1.02e9, "published_parameters": 1.0}
    good |= {"numbers": "1e-06", "target_seconds": 10, "within_target": True, "bytes_of_load": 5e9}
    slow = good | {"within_target": False, "published_parameters": None}
    machine = {"cpu": "a CPU", "threads": 2, "load_average": [1.0]}
    results = {"small": good, "slow": slow, "odd": {"error": "GraphLevelError: it mixes tokens", "numbers": "1e-06"}}
    text = page({"a/small-FP8": "small", "b/odd": "odd"}, {"machine": machine, "versions": {}, "results": results})
    assert "2 of 3 configurations reach a lowered graph; 1 within their targets" in text
    row = "1.02 | 1.0 | 1e-06 | 1.0 | 1.0 | 10 | 0.30 | 9 | 8 | 2 cached_attention | 2.0 | 4,096 | 0 | 5.0 |"
    assert f"| small | {row}" in text and "| slow | 1.02 |  | 1e-06 | 1.0 | 1.0 | over 10 |" in text
    assert "- odd: GraphLevelError: it mixes tokens" in text
    assert "| a/small-FP8 | small (FP8 not executed) |" in text and "| b/odd | odd (refused) |" in text


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_every_configuration_reaches_a_lowered_graph(name: str) -> None:
    assert DATA["parameters"][name] is None or _has_its_size(name)
    graph, report = _lowered(seed_models.without_weights(CONFIGS[name]))
    assert report.rewrites()["insert_cached_ops"] > 0 and graph.states


@pytest.mark.slow
@pytest.mark.parametrize("name", {seed_models.tiny_key(fields): name for name, fields in CONFIGS.items()}.values())
def test_every_tiny_model_is_served_as_its_own_code_computes(name: str) -> None:
    assert "preemptions" in seed_models.numbers(seed_models.tiny(CONFIGS[name]))
