"""The script for GPUs, as far as a CPU shows it: its record, how it goes on with one, and how figures are judged."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Script = Callable[[str], Any]
ROOT = Path(__file__).parents[2]


def _entry(model: str, figure: str, precision: str = "bf16", **values: Any) -> dict[str, Any]:
    return {"model": model, "precision": precision, "figure": figure, **values}


def test_a_record_is_written_and_gone_on_with(
    script: Script, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, gpu = tmp_path / "gpu.json", script("gpu")
    arguments = ["--smoke", "--models", "qwen2.5-3b", "--record", str(path)]
    gpu.main([*arguments, "--figures", "single", "long"])
    record = json.loads(path.read_text())
    build, single, long = record["entries"]
    assert [entry["figure"] for entry in record["entries"]] == ["build", "single", "long"]
    assert not any("error" in entry for entry in record["entries"])
    assert build["facts"]["model"] == "qwen2.5-3b" and build["limits"]["memory_gb_per_second"] > 0
    assert single["memory_share"] == pytest.approx(single["gb_per_second"] / build["limits"]["memory_gb_per_second"])
    assert single["first_request_seconds"] > single["time_to_first_token"] > 0
    assert long["step_seconds"].keys() == {"8", "14", "20"}
    mean = sum(long["step_seconds"].values()) / 3
    assert long["output_tokens_per_second"] == pytest.approx(2 * 16 / (long["prefill_seconds"] + 16 * mean))
    assert str(tmp_path) not in path.read_text() and str(ROOT) not in path.read_text()

    capsys.readouterr()
    gpu.main([*arguments, "--figures", "single", "long", "transformers"])
    entries = json.loads(path.read_text())["entries"]
    assert entries[:3] == record["entries"]
    (theirs,) = entries[3:]
    assert theirs["figure"] == "transformers" and theirs["tokens_per_second"] > 0
    assert "aim" not in capsys.readouterr().out  # tiny models are not judged


@pytest.mark.slow
def test_every_figure(script: Script, tmp_path: Path) -> None:
    some = ["--models", "llama-3.1-8b", "nemotron-flash-3b", "--precisions", "bf16"]
    script("gpu").main(["--smoke", *some, "--output", str(tmp_path)])
    (path,) = tmp_path.glob("*.json")
    entries = json.loads(path.read_text())["entries"]
    assert not [entry["error"] for entry in entries if "error" in entry]
    found = [(entry["model"], entry["figure"]) for entry in entries]
    dense = ("build", "single", "profile", "throughput", "transformers", "start_cold", "start_warm")
    mixture = ("build", "single", "long")
    assert found == [("llama-3.1-8b", name) for name in dense] + [("nemotron-flash-3b", name) for name in mixture]
    profile = entries[2]
    assert profile["batch_2"]["decode"]["step"]["sequences"] == 2
    assert profile["batch_1"]["decode"]["rows"] and profile["batch_1"]["prefill"]["coverage"]["steps"] == 1
    assert (path.parent / f"{path.stem}-profiles" / "llama-3.1-8b-bf16" / "batch-1" / "trace.json").exists()


def test_without_a_device_nothing_is_measured(script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = script("gpu")
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="no CUDA device"):
        gpu.main(["--output", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_what_failed_is_done_again(script: Script) -> None:
    jobs = script("gpu.jobs")
    done = [
        _entry("llama-3.1-8b", "single"),
        _entry("llama-3.1-8b", "profile", error="killed"),
        _entry("llama-3.1-8b", "start_cold"),
        _entry("llama-3.1-8b", "single", "fp8"),
    ]
    left = jobs.jobs(["llama-3.1-8b"], jobs.FIGURES, ["bf16", "fp8"], done)
    assert [(job.precision, job.figures) for job in left] == [
        ("bf16", ("profile", "throughput")),
        ("bf16", ("transformers",)),
        ("bf16", ("start",)),
        ("fp8", ("throughput",)),
    ]
    done += [_entry("llama-3.1-8b", "start_warm"), _entry("llama-3.1-8b", "transformers")]
    assert [job.figures for job in jobs.jobs(["llama-3.1-8b"], ["start", "transformers"], ["bf16"], done)] == []


def test_a_process_is_killed_when_its_time_is_up(script: Script, tmp_path: Path) -> None:
    jobs = script("gpu.jobs")
    job = jobs.Job("qwen2.5-3b", "bf16", ("single", "long"))
    (entry,) = jobs.run(job, 1.0, smoke=True, profiles=tmp_path)
    assert entry == _entry("qwen2.5-3b", "single", error="stopped after 1 s")


def test_figures_beside_their_targets(script: Script) -> None:
    targets = script("gpu.targets")
    entries = [
        _entry("llama-3.1-8b", "single", tokens_per_second=100.0, memory_share=0.95),
        _entry("llama-3.1-8b", "single", tokens_per_second=250.0, memory_share=0.85),
        _entry("llama-3.1-8b", "single", error="killed"),
        _entry("llama-3.1-8b", "transformers", tokens_per_second=125.0),
        _entry("llama-3.1-8b", "throughput", output_tokens_per_second=18000.0, precision="fp8"),
        _entry("llama-3.1-8b", "throughput", output_tokens_per_second=8000.0),
        _entry("llama-3.1-8b", "start_cold", seconds=61.0),
        _entry("llama-3.1-8b", "start_warm", seconds=14.0),
        _entry(
            "llama-3.1-8b",
            "profile",
            batch_1={"decode": {"on_device": True, "timeline": {"between_seconds": 0.03, "seconds": 1.0}}},
            batch_64={"decode": {"on_device": False, "timeline": {"between_seconds": 0.03, "seconds": 1.0}}},
        ),
    ]
    said = dict(target.verdict(entries).split(": ", 1) for target in targets.TARGETS)
    assert said["single stream, 8B bf16, 1k/1k"] == "250 tokens/s (least 240): least reached"
    assert said["the same, share of the copy rate"] == "0.85 (aim 0.9): missed"
    assert said["the same, over transformers compiled"] == "2 times (least 1): least reached"
    assert said["throughput, 8B FP8, 1k/1k"] == "1.8e+04 tokens/s (least 9000, aim 17744): aim reached"
    assert said["throughput, 8B bf16, 1k/1k"] == "8000 tokens/s"
    assert said["capture to first token, 8B, cold"] == "61 s (least 60): missed"
    assert said["capture to first token, 8B, warm"] == "14 s (aim 15): aim reached"
    assert said["idle between steps, 8B, batch 1"] == "3 % (least 5): least reached"
    assert said["idle between steps, 8B, batch 64"] == "not measured"
    assert said["single stream, 30B-A3B hybrid"] == "not measured"


def test_every_model_of_the_plan_is_known(script: Script) -> None:
    jobs, targets = script("gpu.jobs"), script("gpu.targets")
    configs = script("gpu.models").seed_models.DATA["configs"]
    assert set(jobs.MODELS) <= configs.keys()
    assert {targets._DENSE, targets._HYBRID, targets._SMALL, targets._MIXTURE} <= set(jobs.MODELS)
    assert {figure for _, _, figures in jobs.PLAN for figure in figures} == set(jobs.FIGURES)
