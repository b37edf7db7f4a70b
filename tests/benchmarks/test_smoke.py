"""Every benchmark script runs on a tiny model and writes a record that has what it measures; speed is not looked at."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import tiny

Script = Callable[[str], Any]
ROOT = Path(__file__).parents[2]


def _record(folder: Path) -> Any:
    (path,) = folder.glob("*.json")
    return json.loads(path.read_text())


def test_peers(script: Script, tmp_path: Path) -> None:
    script("peers").main(["--smoke", "--output", str(tmp_path)])
    record = _record(tmp_path)
    group = record["precisions"]["bf16"]
    assert not group["failed"]
    assert not record["not_available"]
    figures = {"decode", "first_token_seconds", "prefill_16", "requests", "first_start_seconds"}
    for name in ("AutoDeploy", "transformers"):
        values = group["samples"][name]
        assert values.keys() == figures | {"one_peak_bytes", "requests_peak_bytes"}
        assert all(len(each) == 1 and each[0] > 0 for each in values.values())
        assert 50e6 < values["one_peak_bytes"][0] <= values["requests_peak_bytes"][0]
    facts = group["facts"]["AutoDeploy"]
    # Two layers of grouped attention and gated MLP, and the head; an embedding is looked up.
    products = 2 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 96)
    assert facts["flops_per_token"] == 2 * products
    assert facts["step_weight_bytes"] == 2 * (products + 256 * 64 + 5 * 64)
    assert group["agreement"]["transformers"] == record["load"]["decode"][1]
    assert len(record["limits"]) == 2


def test_quality(script: Script, tmp_path: Path) -> None:
    script("quality").main(["--smoke", "--output", str(tmp_path)])
    precisions = _record(tmp_path)["precisions"]
    reference = precisions["float32"]["transformers"]
    assert reference["agreement"] == 1 and reference["logprob_distance"] == 0
    assert 200 < reference["perplexity"] < 320  # random weights know nothing of 256 tokens
    for precision in ("bf16", "int8", "int4"):
        ours = precisions[precision]["AutoDeploy"]
        assert abs(ours["perplexity"] / reference["perplexity"] - 1) < 0.1
        assert 0 < ours["logprob_distance"] < 0.1 and 0.3 < ours["agreement"] <= 1


def test_servers(script: Script, tmp_path: Path) -> None:
    script("servers").main(["--smoke", "--output", str(tmp_path)])
    record = _record(tmp_path)
    group = record["precisions"]["bf16"]
    assert not group["failed"]
    assert not record["not_available"]
    ours = group["samples"]["AutoDeploy"]
    for begin in ("clients_1", "clients_2", "prefix_apart", "prefix_shared", "repetitive"):
        assert ours[f"{begin}_requests_per_second"][0] > 0
        assert 0 < ours[f"{begin}_first_token_p50_seconds"][0] <= ours[f"{begin}_first_token_p99_seconds"][0]
        assert ours[f"{begin}_between_tokens_p99_seconds"][0] > 0
    assert ours["guided_2_per_token_p50_seconds"][0] > 0
    assert "guided_2_overhead" in ours
    assert len(record["limits"]) == 2


def test_ablation(script: Script, tmp_path: Path) -> None:
    script("ablation").main(["--smoke", "--output", str(tmp_path)])
    group = _record(tmp_path)["precisions"]["bf16"]
    assert group["ratios"].keys() == {"fuse_qkv", "kernel rms_norm"}
    for name, figures in group["samples"].items():
        for figure, pairs in figures.items():
            ((on, off),) = pairs
            assert group["ratios"][name][figure] == pytest.approx(on / off, abs=1e-3)


def test_compare_transformers(script: Script, tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "model")
    script("compare_transformers").main([str(folder), "--smoke", "--output", str(tmp_path / "out")])
    samples = _record(tmp_path / "out")["samples"]
    assert samples.keys() == {"autodeploy torch-simple", "transformers eager"}
    assert all(len(values) == 1 and values[0] > 0 for kinds in samples.values() for values in kinds.values())


@pytest.mark.slow
def test_starts(tmp_path: Path) -> None:
    folder = tiny.save("llama", tmp_path / "model")
    _run("starts.py", str(folder), "--rounds", "1", "--output", str(tmp_path / "out"))
    (seconds,) = _record(tmp_path / "out")["rounds"]
    assert seconds.keys() == {"cold", "warm"}


@pytest.mark.slow
def test_capture_cost(tmp_path: Path) -> None:
    _run("capture_cost.py", "qwen2.5-0.5b", "--output", str(tmp_path))
    result = _record(tmp_path)["results"]["qwen2.5-0.5b"]
    assert result["mixers"] == {"cached_attention": 24}


def _run(name: str, *arguments: str) -> None:
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    command = [sys.executable, str(ROOT / "benchmarks" / name), *arguments]
    subprocess.run(command, env=environment, check=True, capture_output=True, cwd=ROOT)


def test_speculation(script: Script, tmp_path: Path) -> None:
    folder, output = tiny.save("llama", tmp_path / "model"), tmp_path / "record.json"
    sizes = ["--rounds", "1", "--prompts", "1", "--tokens", "8"]
    script("speculation").main([str(folder), "--draft-model", str(folder), *sizes, "--output", str(output)])
    rows = {(row["prompts"], row["drafts"]): row for row in json.loads(output.read_text())["rows"]}
    assert rows.keys() == {(kind, way) for kind in ("plain", "repetitive") for way in ("none", "ngram", "draft_model")}
    assert all(row["tokens_per_second"] > 0 and row["speedup"] > 0 for row in rows.values())
    assert rows["plain", "none"]["accepted"] == 1 and rows["plain", "draft_model"]["accepted"] > 3


def test_quantized_linear(script: Script, tmp_path: Path) -> None:
    script("quantized_linear").main(["--smoke", "--output", str(tmp_path)])
    record = _record(tmp_path)
    assert record["weight_bytes"] == {
        "bf16": 64 * 64 * 2,
        "int8": 64 * 64 + 64 * 2,
        "int8 groups of 32": 64 * 64 + 64 * 2 * 2,
        "int4": 64 * 32 + 64 * 2 * 2 * 2,
        "int4 around zero": 64 * 32 + 64 * 2 * 2,
    }
    for by_rows in record["seconds"].values():
        assert by_rows.keys() == {"1", "4", "16", "64", "256"}
        assert all(len(seconds) == 1 and seconds[0] > 0 for seconds in by_rows.values())


def test_host_cost(script: Script, tmp_path: Path) -> None:
    script("host_cost").main(["--sequences", "1", "3", "--steps", "2", "--vocab", "300", "--output", str(tmp_path)])
    for by_sequences in _record(tmp_path)["microseconds"].values():
        assert by_sequences.keys() == {"1", "3"}
        for parts in by_sequences.values():
            assert parts.keys() == {"schedule", "metadata", "sample", "rest", "total"}
            assert all(value > 0 for value in parts.values())


def test_http_cost(tmp_path: Path) -> None:
    _run("http_cost.py", "--streams", "2", "--tokens", "5", "--output", str(tmp_path))
    for by_streams in _record(tmp_path)["microseconds_per_token"].values():
        assert by_streams.keys() == {"2"} and by_streams["2"] > 0
