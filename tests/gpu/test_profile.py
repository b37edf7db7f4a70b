"""A profile on CUDA: the trace has kernels, each op's were launched by it, and graphs are told from plain launches.

Run it with `make test-gpu`. It skips, and says so, where there is no CUDA device.
"""

import json
from pathlib import Path

import pytest
import torch

from autodeploy.bench import latency
from autodeploy.bench.profile.run import DECODE_STEPS
from autodeploy.config import parse_options
from tests import tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: nothing of this file was tested here"),
]


@pytest.mark.parametrize("backend", ["torch-simple", "torch-cudagraph"])
def test_kernels_are_found_and_told_from_graphs(backend: str, tmp_path: Path) -> None:
    options = parse_options({"compile_backend": backend, "device": "cuda", "kv_cache_memory_bytes": 2**24})
    latency.run(tiny.llama(), options, input_len=80, output_len=3, repeats=1, profile=tmp_path)
    record = json.loads((tmp_path / "profile.json").read_text())
    for phase in (record["results"]["decode"], record["results"]["prefill"]):
        assert phase["on_device"] is True and phase["timeline"]["busy_seconds"] > 0
        seconds = {row["op"]: row["seconds"] for row in phase["rows"]}
        assert min(seconds[op] for op in ("linear", "cached_rope_attention", "rms_norm")) > 0
    decode = record["results"]["decode"]
    assert decode["timeline"]["steps"] == decode["coverage"]["steps"] == DECODE_STEPS
    assert decode["coverage"]["counted"] >= DECODE_STEPS * len(decode["rows"]) / 4  # views launch nothing
    if backend == "torch-simple":
        assert decode["coverage"]["covered"] == 0
    else:
        assert record["build"]["facts"]["cuda_graphs"]["text"]["not_captured"] == {}
        assert decode["coverage"]["covered_steps"] == DECODE_STEPS
        assert decode["coverage"]["covered"] > decode["coverage"]["counted"] / 2
