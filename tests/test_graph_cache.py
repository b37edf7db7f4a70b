"""The graph cache: a second start skips capture and gives the same program; what matters makes another entry."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from autodeploy import graph_cache
from autodeploy.build import build
from autodeploy.checkpoint import kept
from autodeploy.compile.program import Program
from autodeploy.config import parse_options
from autodeploy.debug.packed_run import run_packed
from autodeploy.errors import CheckpointError, ConfigError
from tests import tiny


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("AUTODEPLOY_CACHE", str(tmp_path / "cache"))
    return tiny.save("llama", tmp_path / "model")


def _build(folder: Path, **options: Any) -> Program:
    return build(str(folder), parse_options(options))


def _is_restored(program: Program) -> bool:
    return program.report.facts.get("graph") == "restored"


def _logits(program: Program) -> torch.Tensor:
    return run_packed(program, [torch.tensor([3, 1, 4]), torch.tensor([1, 5])])


@pytest.mark.parametrize("options", [{}, {"quantization": "int8"}], ids=str)
def test_a_second_start_is_restored_and_the_same(folder: Path, options: dict[str, str]) -> None:
    first, second = _build(folder, **options), _build(folder, **options)
    assert not _is_restored(first) and _is_restored(second)
    assert "capture" in first.report.seconds and "capture" not in second.report.seconds
    assert torch.equal(_logits(first), _logits(second))
    for name in ("vocab_size", "weight_bytes", "step_weight_bytes", "flops_per_token", "flops_per_logits_row"):
        assert getattr(first, name) == getattr(second, name), name
    assert first.report.rewrites() == second.report.rewrites()
    assert first.report.kernels == second.report.kernels
    assert second.report.facts["isolation"] == "passed"


def test_a_second_start_needs_neither_transformers_nor_the_module(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AUTODEPLOY_NATIVE", "0")  # this cache directory has no compiled kernels
    _build(folder)
    code = (
        "import sys; from autodeploy import LLM, SamplingParams;"
        f"llm = LLM({str(folder)!r}, skip_tokenizer_init=True);"
        "llm.generate([[3, 1, 4]], SamplingParams(max_tokens=2), use_tqdm=False); llm.shutdown();"
        "print([name for name in ('transformers', 'torch._dynamo', 'sympy') if name in sys.modules])"
    )
    paths = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=paths, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_kept_start_refuses_what_a_first_one_refuses(folder: Path) -> None:
    _build(folder)
    with pytest.raises(ConfigError, match="is more than the"):
        _build(folder, max_model_len=10**6)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-64])
    with pytest.raises(CheckpointError, match="cut short"):
        _build(folder)


def test_other_weights_of_the_same_config_are_read(folder: Path, tmp_path: Path) -> None:
    first = _build(folder)
    model = tiny.TINY["llama"]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    model.save_pretrained(tmp_path / "model")
    second = _build(folder)
    assert _is_restored(second) and not torch.allclose(_logits(first), _logits(second))
    with torch.no_grad():
        expected = model(torch.tensor([[3, 1, 4]])).logits[0]
    torch.testing.assert_close(_logits(second)[:3], expected, rtol=1e-4, atol=1e-4)


def test_a_second_start_takes_quantised_weights_as_the_first_made_them(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "SETTLED_SECONDS", -1.0)
    first, second = _build(folder, quantization="int8"), _build(folder, quantization="int8")
    assert "weights" not in first.report.facts
    assert second.report.facts["weights"] == "quantised by an earlier start"
    assert torch.equal(_logits(first), _logits(second))
    without = _build(folder, quantization="int8", weight_cache=False)
    assert _is_restored(without) and "weights" not in without.report.facts
    assert torch.equal(_logits(first), _logits(without))
    model = tiny.TINY["llama"]()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    model.save_pretrained(tmp_path / "model")
    other = _build(folder, quantization="int8")
    assert _is_restored(other) and "weights" not in other.report.facts
    assert not torch.allclose(_logits(first), _logits(other))


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "bfloat16"},
        {"attn_backend": "torch"},
        {"transforms": {"fuse_qkv": {"enabled": False}}},
        {"model_kwargs": {"num_hidden_layers": 2}},
        {"graph_cache": False},
        {"compile_backend": "torch-compile", "load_format": "dummy"},
    ],
    ids=str,
)
def test_what_matters_makes_another_entry(folder: Path, options: dict[str, Any]) -> None:
    _build(folder)
    assert not _is_restored(_build(folder, **options))


def test_changed_code_makes_another_entry(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _build(folder)
    monkeypatch.setattr(graph_cache, "_code_hash", lambda: "other")
    assert not _is_restored(_build(folder))


def test_a_users_module_is_never_kept(folder: Path) -> None:
    for _ in range(2):
        assert not _is_restored(build(tiny.TINY["llama"]()))


def test_a_damaged_entry_is_built_anew(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _build(folder)
    (path,) = (tmp_path / "cache" / "graphs").iterdir()
    (path / "graph.json").write_text("{")
    program = _build(folder)
    assert not _is_restored(program) and "cannot be read" in caplog.text
    assert _logits(program).isfinite().all()
    assert _is_restored(_build(folder)), "and kept again"


def test_a_full_disk_costs_the_entry_and_not_the_start(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def write(description: Any, graph: Any, place: Path, extra: Any) -> None:
        with open("/dev/full", "w", encoding="utf-8") as disk:
            disk.write("x")

    expected = _logits(_build(folder))
    monkeypatch.setenv("AUTODEPLOY_CACHE", str(folder / "another cache"))
    monkeypatch.setenv("AUTODEPLOY_NATIVE", "0")
    monkeypatch.setattr(graph_cache, "save", write)
    program = _build(folder)
    torch.testing.assert_close(_logits(program), expected)
    assert "the graph is not kept" in caplog.text and "is full" in caplog.text
    assert not _is_restored(program) and list((folder / "another cache" / "graphs").iterdir()) == []
