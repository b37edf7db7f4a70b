"""Throughput: every request is served to its length, the queue is never overfilled, rates follow from the samples."""

import json
from pathlib import Path

import pytest

from autodeploy.bench import throughput
from autodeploy.bench.machine import MachineLimits
from autodeploy.config import parse_options
from autodeploy.errors import ConfigError
from tests import tiny

LIMITS = MachineLimits(
    device="cpu", dtype="float32", threads=2, memory_gb_per_second=2.0, matmul_gflop_per_second=5.0, matmul_size=1024
)


def test_the_result_follows_from_the_samples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(throughput, "measure", lambda device, dtype: LIMITS)
    folder = tiny.save("llama", tmp_path / "model")
    options = parse_options(
        {
            "compile_backend": "torch-simple",
            "check_isolation": False,
            "device": "cpu",
            "max_num_seqs": 3,
            "max_queued_requests": 2,  # fewer than the requests: they must be fed as room appears
        }
    )
    lengths = {"input_len": (2, 20), "output_len": (3, 6)}
    path = tmp_path / "throughput.json"
    result = throughput.run(str(folder), options, num_prompts=8, json_path=path, **lengths)

    samples = json.loads(path.read_text())["samples"]
    requests = throughput.random_requests(tiny.VOCAB_SIZE, 8, (2, 20), (3, 6))
    num_input, num_output = sum(len(prompt) for prompt, _ in requests), sum(length for _, length in requests)
    assert sum(samples["step_tokens"]) == num_output
    assert result.seconds == pytest.approx(sum(samples["step_seconds"]))
    assert result.output_tokens_per_second == pytest.approx(num_output / result.seconds)
    assert result.total_tokens_per_second == pytest.approx((num_input + num_output) / result.seconds)
    assert result.requests_per_second == pytest.approx(8 / result.seconds)
    assert max(samples["step_batch"]) <= 3
    assert 1.5 < result.mean_batch <= 3
    assert result.num_steps == len(samples["step_seconds"])
    assert "8 requests" in capsys.readouterr().out


def test_requests_stay_within_their_ranges_and_differ() -> None:
    requests = throughput.random_requests(100, 50, (3, 5), (1, 1))
    assert {len(prompt) for prompt, _ in requests} == {3, 4, 5}
    assert {length for _, length in requests} == {1}
    assert len({tuple(prompt) for prompt, _ in requests}) == 50
    assert requests == throughput.random_requests(100, 50, (3, 5), (1, 1))


@pytest.mark.parametrize(
    "load", [{"num_prompts": 0}, {"input_len": (0, 3)}, {"input_len": (5, 3)}, {"output_len": (0, 0)}]
)
def test_a_load_of_nothing_is_refused(load: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        throughput.run("no-model-is-looked-for", **load)  # type: ignore[arg-type]
