"""Bad input through the front door: each kind gets one clear error, and the next good request is served as ever."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from autodeploy import LLM, SamplingParams
from autodeploy.errors import CheckpointError, ConfigError, InvalidRequestError, ModelNotFoundError, OutOfMemoryError
from tests import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("model") / "llama")


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with LLM(str(folder), max_model_len=64, kv_cache_memory_bytes=200_000) as deployed:
        yield deployed


def _good(llm: LLM) -> list[int]:
    params = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    return llm.generate({"prompt_token_ids": [5, 6, 7]}, params, use_tqdm=False)[0].outputs[0].token_ids


@pytest.mark.parametrize(
    ("prompt", "params", "says"),
    [
        ({"prompt_token_ids": []}, {}, "empty"),
        ("", {}, "empty"),
        ({"prompt_token_ids": [1, tiny.VOCAB_SIZE]}, {}, str(tiny.VOCAB_SIZE)),
        ({"prompt_token_ids": [-1]}, {}, "-1"),
        ({"prompt_token_ids": [1] * 64}, {}, "64"),
        ({"prompt_token_ids": [1] * 100_000}, {}, "100000"),
        ({"prompt_token_ids": ["one"]}, {}, "one"),
        ({"tokens": [1]}, {}, "tokens"),
        ([1, 2], {"max_tokens": 0}, "max_tokens"),
        ([1, 2], {"max_tokens": -3}, "max_tokens"),
        ([1, 2], {"temperature": math.nan}, "temperature"),
        ([1, 2], {"temperature": math.inf}, "temperature"),
        ([1, 2], {"temperature": -1.0}, "temperature"),
        ([1, 2], {"top_p": 0.0}, "top_p"),
        ([1, 2], {"top_k": -2}, "top_k"),
        ([1, 2], {"min_p": 2.0}, "min_p"),
        ([1, 2], {"n": 0}, "n"),
        ([1, 2], {"logprobs": 1000}, "logprobs"),
        ([1, 2], {"stop": [""]}, "stop"),
    ],
)
def test_requests(llm: LLM, prompt: Any, params: dict[str, Any], says: str) -> None:
    before = _good(llm)
    with pytest.raises(InvalidRequestError, match=says):
        llm.generate(prompt, SamplingParams(**params), use_tqdm=False)
    assert _good(llm) == before


def test_huge_max_tokens_ends_at_the_models_limit(llm: LLM) -> None:
    params = SamplingParams(temperature=0.0, max_tokens=10**9, ignore_eos=True)
    (output,) = llm.generate({"prompt_token_ids": [5] * 10}, params, use_tqdm=False)[0].outputs
    assert len(output.token_ids) == 64 - 10 and output.finish_reason == "length"


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"max_num_sequences": 2}, ConfigError, "did you mean 'max_num_seqs'"),
        ({"kv_cache_memory_bytes": 1000}, OutOfMemoryError, "raise kv_cache_memory_bytes"),
        ({"attn_backend": "flashinfer"}, ConfigError, "attn_backend"),
        ({"compile_backend": "torch-cudagraph"}, ConfigError, "compile_backend"),
        ({"device": "cuda:99"}, ConfigError, "device"),
        ({"transforms": {"fuse_kqv": {}}}, ConfigError, "did you mean 'fuse_qkv'"),
        ({"model_kwargs": {"num_layers_hidden": 2}}, ConfigError, "num_hidden_layers"),
        ({"max_model_len": 10**6}, ConfigError, "max_model_len"),
    ],
)
def test_deployments(folder: Path, options: dict[str, Any], error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        LLM(str(folder), **options)


def test_no_such_model() -> None:
    with pytest.raises(ModelNotFoundError, match="nowhere"):
        LLM("/nowhere/to/be/found")


def test_damaged_weights(folder: Path, tmp_path: Path) -> None:
    for file in folder.iterdir():
        data = file.read_bytes()
        (tmp_path / file.name).write_bytes(data[: len(data) // 2] if file.suffix == ".safetensors" else data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        LLM(str(tmp_path))
    next(tmp_path.glob("*.safetensors")).unlink()
    with pytest.raises(CheckpointError, match="no weights"):
        LLM(str(tmp_path))
