"""Records: what a later reader needs is in the file."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from autodeploy.bench import record
from autodeploy.bench.machine import MachineLimits
from autodeploy.compile.program import Program
from autodeploy.config import Options, parse_options
from autodeploy.graph.report import BuildReport

LIMITS = MachineLimits(
    device="cpu", dtype="float32", threads=2, memory_gb_per_second=20.0, matmul_gflop_per_second=100.0, matmul_size=1024
)


def test_a_record_holds_its_conditions(tmp_path: Path) -> None:
    report = BuildReport(facts={"dtype": "float32"}, seconds={"capture": 1.5})
    program = Program(
        graphs={},
        states=(),
        vocab_size=8,
        max_model_len=None,
        dtype=torch.float32,
        device=torch.device("cpu"),
        report=report,
    )
    path = tmp_path / "new" / "folder" / "record.json"
    record.write(
        path,
        benchmark="latency",
        arguments={"input_len": 3},
        options=parse_options({"max_num_seqs": 7}),
        program=program,
        limits=LIMITS,
        results={"rate": 2.0},
        samples={"seconds": [0.1, 0.2]},
    )
    stored = json.loads(path.read_text())
    assert stored["options"]["engine"]["max_num_seqs"] == 7
    assert set(stored["options"]) == {field.name for field in dataclasses.fields(Options)}
    assert stored["build"]["facts"] == {"dtype": "float32"}
    assert stored["limits"]["memory_gb_per_second"] == 20.0
    assert stored["samples"] == {"seconds": [0.1, 0.2]}
    assert stored["versions"]["torch"].startswith("2.")
    assert stored["machine"]["torch_threads"] == torch.get_num_threads()


def test_packages_that_are_missing_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "_PACKAGES", ("torch", "no-such-package-anywhere"))
    assert set(record.versions()) == {"python", "torch"}
