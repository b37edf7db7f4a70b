"""The pipeline as a whole: overrides by name, levels between stages, strictness, and every transform tested."""

from pathlib import Path

import pytest
import torch

from autodeploy.config import CompileOptions
from autodeploy.errors import ConfigError, TransformError
from autodeploy.graph.levels import Level
from autodeploy.transforms.pipeline import configure, default_pipeline
from tests import tiny
from tests.graphs import attention_model, captured, causal_sdpa, counts

CPU = torch.device("cpu")


def test_every_transform_has_a_test_file_that_names_it() -> None:
    tests = "\n".join(path.read_text(encoding="utf-8") for path in Path(__file__).parent.rglob("test_*.py"))
    for transform in default_pipeline(CPU).transforms().values():
        assert f"{type(transform).__name__}(" in tests, f"{type(transform).__name__} is tested nowhere"


def test_stages_reach_their_levels() -> None:
    graph = captured(attention_model(causal_sdpa))
    reached = []
    for stage in default_pipeline(CPU).stages:
        list(stage.run(graph))
        reached.append(graph.level)
    assert reached == [Level.CANONICAL, Level.CANONICAL, Level.CACHED, Level.CACHED, Level.LOWERED]


def test_a_transform_is_switched_off_by_name() -> None:
    pipeline = configure(default_pipeline(CPU), CompileOptions(transforms={"fuse_qkv": {"enabled": False}}))
    graph = captured(attention_model(causal_sdpa))
    names = [report.name for stage in pipeline.stages for report in stage.run(graph)]
    assert "fuse_qkv" not in names and "fuse_gate_up" in names


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"fuse_qvk": {}}, "did you mean 'fuse_qkv'"),
        ({"fuse_qkv": {"enable": False}}, "did you mean 'enabled'"),
    ],
)
def test_unknown_names_are_refused(overrides: dict[str, dict[str, bool]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configure(default_pipeline(CPU), CompileOptions(transforms=overrides))


def test_gates_and_rates_of_a_hybrid_in_bfloat16_are_in_its_ops_and_weights() -> None:
    graph = captured(tiny.HYBRID["bamba"]().bfloat16())
    reports = {report.name: report for stage in default_pipeline(CPU).stages for report in stage.run(graph)}
    num_scans = counts(graph)["cached_ssd"]
    assert num_scans == counts(graph)["gated_rms_norm"] == reports["fuse_gated_norm_casts"].rewritten > 0
    assert reports["fold_weights"].rewritten >= 3 * num_scans
    others = {str(node.target) for node in graph.graph.nodes if node.op == "call_function"}
    assert not others & {"aten.exp.default", "aten.silu.default", "aten.rsqrt.default"}


def test_strict_fails_on_leftovers() -> None:
    model = attention_model(causal_sdpa)
    model.layer.q = torch.nn.Linear(16, 16)  # a bias that k and v lack: fuse_qkv refuses
    graph = captured(model)
    stages = default_pipeline(CPU).stages
    list(stages[0].run(graph))
    with pytest.raises(TransformError, match=r"fuse_qkv expected 1 .* some have a bias"):
        list(stages[1].run(graph, strict=True))
