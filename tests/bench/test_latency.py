"""Latency: the figures follow from the samples and from the model's sizes, counted here a second time by hand."""

import json
import statistics
from pathlib import Path

import pytest
import torch

from autodeploy.bench import latency
from autodeploy.bench.machine import MachineLimits
from autodeploy.compile.program import Program
from autodeploy.config import Options, parse_options
from autodeploy.errors import ConfigError
from autodeploy.ops.state import PagedState, SlotState
from tests import tiny

LIMITS = MachineLimits(
    device="cpu", dtype="float32", threads=2, memory_gb_per_second=2.0, matmul_gflop_per_second=5.0, matmul_size=1024
)
OPTIONS: Options = parse_options({"compile_backend": "torch-simple", "check_isolation": False, "device": "cpu"})


def test_the_result_follows_from_the_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(latency, "measure", lambda device, dtype: LIMITS)
    folder = tiny.save("llama", tmp_path / "model")
    json_path = tmp_path / "latency.json"
    result = latency.run(str(folder), OPTIONS, input_len=10, output_len=5, repeats=3, json_path=json_path)

    record = json.loads(json_path.read_text())
    warm_up, *measured = record["samples"]["token_seconds"]
    assert len(measured) == 3
    assert all(len(times) == 5 and times == sorted(times) for times in (warm_up, *measured))
    first = statistics.median(times[0] for times in measured)
    per_token = statistics.median((times[4] - times[0]) / 4 for times in measured)
    assert result.time_to_first_token == first
    assert result.time_per_output_token == per_token
    assert result.prefill_tokens_per_second == pytest.approx(10 / first)
    assert result.decode_tokens_per_second == pytest.approx(1 / per_token)
    assert result.first_request_seconds == warm_up[4]

    model = tiny.llama()
    weight_bytes = sum(p.nbytes for name, p in model.named_parameters() if "embed" not in name)
    # Keys and values of three layers, two heads of twelve float32 numbers each, for a context of 10 + 5 // 2 tokens.
    cache_bytes = 2 * 3 * 2 * 12 * 4 * 12
    assert result.decode_gb_per_second == pytest.approx((weight_bytes + cache_bytes) / per_token / 1e9)
    assert result.memory_share == pytest.approx(result.decode_gb_per_second / 2.0)
    matrices = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name)
    head = model.lm_head.weight.numel()  # runs for the last token alone
    flops = 2 * (matrices - head) * 10 + 2 * head
    assert result.prefill_gflop_per_second == pytest.approx(flops / first / 1e9)
    assert result.matmul_share == pytest.approx(result.prefill_gflop_per_second / 5.0)
    assert "time to first token" in capsys.readouterr().out


def test_state_bytes_count_windows_and_slots() -> None:
    program = Program(
        graphs={},
        states=(
            PagedState(name="key", shape=(2, 8), dtype=torch.bfloat16),
            PagedState(name="window_key", shape=(2, 8), dtype=torch.bfloat16, window=16),
            SlotState(name="recurrent", shape=(4, 4), dtype=torch.float32),
        ),
        vocab_size=8,
        max_model_len=None,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )
    assert latency.state_bytes_read(program, 10) == 10 * 32 + 10 * 32 + 64
    assert latency.state_bytes_read(program, 100) == 100 * 32 + 16 * 32 + 64


def test_every_request_has_its_own_prompt() -> None:
    prompts = [latency.random_prompt(256, 32, seed) for seed in range(4)]
    assert len({tuple(prompt) for prompt in prompts}) == 4
    assert latency.random_prompt(256, 32, 1) == prompts[1]
    assert all(0 <= token < 256 for prompt in prompts for token in prompt)


@pytest.mark.parametrize("lengths", [{"input_len": 0}, {"output_len": 1}, {"repeats": 0}])
def test_a_measurement_of_nothing_is_refused(lengths: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="latency needs"):
        latency.run("no-model-is-looked-for", **lengths)
