import json
from pathlib import Path
from typing import Any

import pytest
import torch

from autodeploy.config import ModelOptions
from autodeploy.errors import CheckpointError, ConfigError, UnsupportedModelError
from autodeploy.models.resolve import resolve_model
from tests import tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.save("llama", tmp_path / "tiny-model")


def change_json(path: Path, **fields: Any) -> None:
    """Set fields of a JSON file; a field of None is removed."""
    values = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


def test_a_folder(folder: Path) -> None:
    resolved = resolve_model(str(folder), ModelOptions())
    assert (resolved.folder, resolved.config.model_type) == (folder, "llama")
    assert resolved.dtype == torch.float32
    assert resolved.eos_token_ids == (tiny.EOS,)
    assert resolved.max_model_len == tiny.MAX_LENGTH


@pytest.mark.parametrize("content", ["{", "[]", '{"model_type": "llama", "num_hidden_layers": "three"}'])
def test_a_damaged_config_is_named(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        resolve_model(str(folder), ModelOptions())


@pytest.mark.parametrize("model_type", ["never-heard-of", None])
def test_an_unknown_model_type(folder: Path, model_type: str | None) -> None:
    change_json(folder / "config.json", model_type=model_type)
    with pytest.raises(UnsupportedModelError, match=rf"unknown model_type {model_type!r}; use a newer transformers"):
        resolve_model(str(folder), ModelOptions())


REMOTE_CODE = """
from pathlib import Path
from transformers import PretrainedConfig

Path(__file__).with_name("ran").touch()
Path({marker!r}).touch()

class HomeMadeConfig(PretrainedConfig):
    model_type = "home-made"
"""


def test_remote_code_runs_only_when_asked_for(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (folder / "home_made.py").write_text(REMOTE_CODE.format(marker=str(marker)))
    change_json(folder / "config.json", model_type="home-made", auto_map={"AutoConfig": "home_made.HomeMadeConfig"})
    with pytest.raises(UnsupportedModelError, match=r"brings its own code.*trust_remote_code=True"):
        resolve_model(str(folder), ModelOptions())
    assert not marker.exists()
    resolved = resolve_model(str(folder), ModelOptions(trust_remote_code=True))
    assert marker.exists() and resolved.config.model_type == "home-made"


def test_own_code_of_a_known_model_type_does_not_run_unasked(folder: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    (folder / "home_made.py").write_text(REMOTE_CODE.format(marker=str(marker)))
    change_json(folder / "config.json", auto_map={"AutoConfig": "home_made.HomeMadeConfig"})
    assert resolve_model(str(folder), ModelOptions()).config.model_type == "llama"
    assert not marker.exists()


def test_quantised_weights_are_refused_but_not_made_up_ones(folder: Path) -> None:
    change_json(folder / "config.json", quantization_config={"quant_method": "fp8"})
    with pytest.raises(UnsupportedModelError, match=r"quantised weights .*fp8"):
        resolve_model(str(folder), ModelOptions())
    resolve_model(str(folder), ModelOptions(load_format="dummy"))


@pytest.mark.parametrize(
    ("stored", "wanted", "dtype"),
    [
        ("float16", "auto", torch.float16),
        ("bfloat16", "auto", torch.bfloat16),
        ("bfloat16", "float32", torch.float32),
        (None, "auto", torch.float32),  # the weights' own
    ],
)
def test_dtype(folder: Path, stored: str | None, wanted: str, dtype: torch.dtype) -> None:
    change_json(folder / "config.json", dtype=stored)
    assert resolve_model(str(folder), ModelOptions(dtype=wanted)).dtype == dtype


def test_ids_and_sampling_come_from_the_generation_config(folder: Path) -> None:
    change_json(folder / "generation_config.json", eos_token_id=[5, 6], temperature=0.6, top_p=0.9, max_length=20)
    resolved = resolve_model(str(folder), ModelOptions())
    assert resolved.eos_token_ids == (5, 6)
    assert resolved.located.generation_defaults == {"temperature": 0.6, "top_p": 0.9}
    (folder / "generation_config.json").unlink()
    assert resolve_model(str(folder), ModelOptions()).eos_token_ids == (tiny.EOS,)
    change_json(folder / "config.json", eos_token_id=None)
    resolve_model(str(folder), ModelOptions())  # the config class has a default of its own


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_max_model_len(tmp_path: Path, name: str) -> None:
    folder = str(tiny.save(name, tmp_path))
    assert resolve_model(folder, ModelOptions()).max_model_len == tiny.MAX_LENGTH
    assert resolve_model(folder, ModelOptions(max_model_len=tiny.MAX_LENGTH)).max_model_len == tiny.MAX_LENGTH
    assert resolve_model(folder, ModelOptions(max_model_len=7)).max_model_len == 7
    with pytest.raises(ConfigError, match=rf"max_model_len={tiny.MAX_LENGTH + 1} is more than the {tiny.MAX_LENGTH}"):
        resolve_model(folder, ModelOptions(max_model_len=tiny.MAX_LENGTH + 1))


def test_model_kwargs_are_applied(folder: Path) -> None:
    options = ModelOptions(model_kwargs={"num_hidden_layers": 2, "max_position_embeddings": 99})
    resolved = resolve_model(str(folder), options)
    assert (resolved.config.num_hidden_layers, resolved.max_model_len) == (2, 99)
