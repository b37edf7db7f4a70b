"""A profile of a tiny model: its files have what they should, and its figures follow from each other."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from autodeploy.bench import latency, throughput
from autodeploy.bench.machine import MachineLimits
from autodeploy.bench.profile.op_by_op import Call
from autodeploy.bench.profile.run import DECODE_STEPS, NUM_TOKENS, REPEATS, WARM_STEPS, _device_seconds
from autodeploy.bench.profile.trace import Range, Trace, Work, read_trace
from autodeploy.bench.profile.watch import Watch
from autodeploy.config import parse_options
from autodeploy.debug.costs import Cost
from autodeploy.errors import ConfigError
from autodeploy.kernels.provider import unavailable
from tests import tiny

LIMITS = MachineLimits(
    device="cpu", dtype="float32", threads=2, memory_gb_per_second=2.0, matmul_gflop_per_second=5.0, matmul_size=1024
)


@pytest.fixture(autouse=True)
def _no_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (latency, throughput):
        monkeypatch.setattr(module, "measure", lambda device, dtype: LIMITS)


def _record(folder: Path) -> Any:
    return json.loads((folder / "profile.json").read_text())


@pytest.mark.parametrize("backend", ["torch-simple", "replay"])
def test_one_request(backend: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = parse_options({"compile_backend": backend, "check_isolation": False, "device": "cpu"})
    if backend == "replay" and unavailable(torch.device("cpu")):
        pytest.skip("no native kernels here")
    folder = tmp_path / "profile"
    latency.run(tiny.llama(), options, input_len=80, output_len=3, repeats=1, profile=folder)

    record = _record(folder)
    assert record["build"]["facts"]["compile_backend"] == backend and record["limits"]["memory_gb_per_second"] == 2.0
    decode, prefill = record["results"]["decode"], record["results"]["prefill"]
    assert (prefill["step"]["tokens"], prefill["step"]["context"], prefill["step"]["keys"]) == (80, 80, 40.5)
    last = 80 + 1 + WARM_STEPS + DECODE_STEPS + 1
    assert (decode["step"]["tokens"], decode["step"]["sequences"], decode["step"]["context"]) == (1, 1, last)
    for phase in (decode, prefill):
        assert phase["served_seconds"] > 0
        assert phase["ops_seconds"] == pytest.approx(sum(row["seconds"] for row in phase["rows"]))
        assert phase["limit_seconds"] == pytest.approx(sum(row["limit_seconds"] for row in phase["rows"]))
        assert sum(row["calls"] for row in phase["rows"] if row["op"] == "cached_attention") == 3
    # The products of a prefill take longer by operations, those of a step of one token by memory.
    model = tiny.llama()
    products = [row for row in prefill["rows"] if row["op"] == "linear" and row["limited_by"] == "operations"]
    inner = sum(p.numel() for name, p in model.named_parameters() if "layers" in name and p.dim() == 2)
    assert sum(row["limit_seconds"] for row in products) == pytest.approx(2 * 80 * inner / 5e9, rel=0.01)

    steps = decode["timeline"]
    assert steps["steps"] == DECODE_STEPS and decode["on_device"] is False
    assert steps["seconds"] == pytest.approx(steps["busy_seconds"] + steps["between_seconds"])
    covered = decode["coverage"]
    assert covered["steps"] == DECODE_STEPS
    assert covered["covered_steps"] == (DECODE_STEPS if backend == "replay" else 0)
    assert (covered["covered"] > 0) == (backend == "replay")

    trace = read_trace(folder / "trace.json")
    assert len(trace.named("step")) == 1 + 1 + WARM_STEPS + DECODE_STEPS + 1
    by_op = trace.named("decode, op by op", "prefill, op by op")
    for each in by_op:
        inside = [one for one in trace.ranges if one.name.startswith("linear (") and each.begin < one.begin < each.end]
        assert len(inside) == sum(row["calls"] for row in decode["rows"] if row["op"] == "linear")
    assert len(by_op) == 2
    assert (folder / "profile.txt").read_text().strip() in capsys.readouterr().out


def test_a_full_batch_of_a_hybrid(tmp_path: Path) -> None:
    """Prompts in chunks while others decode already; queued ones are no more than may be."""
    options = parse_options(
        {"device": "cpu", "max_num_seqs": 3, "max_num_batched_tokens": 20, "check_isolation": False, "page_size": 4}
    )
    throughput.run(tiny.bamba(), options, num_prompts=5, input_len=(20, 30), output_len=(2, 2), profile=tmp_path)
    results = _record(tmp_path)["results"]
    assert results["decode"]["step"]["sequences"] == results["decode"]["step"]["tokens"] == 3
    assert results["prefill"]["step"]["tokens"] == 20
    rows = results["decode"]["rows"]
    assert {"cached_ssd", "cached_attention"} <= {row["op"] for row in rows}


def test_times_on_a_device_are_medians_without_the_first_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many runs of a prefill as of a decode step; the first of each may be slower."""
    calls = [Call(name, "linear", "triton", "", Cost()) for name in ("first", "second")]
    watch = Watch()
    monkeypatch.setattr(Watch, "ops", SimpleNamespace(calls=calls))
    ranges, work = [], []
    for run in range(2 * REPEATS):
        for index, call in enumerate(calls):
            begin = 10.0 * run + index
            ranges.append(Range(call.label, 1, begin, begin + 0.5))
            slow = 100.0 if run % REPEATS == 0 else 1.0
            length = slow * (1 + index) * (1 if run < REPEATS else 0.25)
            work.append(Work("kernel", begin, begin + length, (begin + 0.1, 1), False))
    found = _device_seconds(watch, Trace(ranges, work))
    assert found["prefill"] == pytest.approx({"first": 1.0, "second": 2.0})
    assert found["decode"] == pytest.approx({"first": 0.25, "second": 0.5})


def test_what_cannot_be_profiled_is_refused(tmp_path: Path) -> None:
    options = parse_options({"device": "cpu", "check_isolation": False})
    drafting = replace(options, engine=replace(options.engine, speculative_config={"method": "ngram"}))
    with pytest.raises(ConfigError, match="leave speculative_config out"):
        latency.run("no-model-is-looked-for", drafting, profile=tmp_path)
    with pytest.raises(ConfigError, match=f"needs {NUM_TOKENS} tokens behind the prompt"):
        latency.run(tiny.llama(), options, input_len=tiny.MAX_LENGTH - 8, output_len=2, repeats=1, profile=tmp_path)
    with pytest.raises(ConfigError, match="input_len >= 2"):
        latency.run(tiny.llama(), options, input_len=1, output_len=2, repeats=1, profile=tmp_path)
