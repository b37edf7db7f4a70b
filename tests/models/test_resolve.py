import json
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from autodeploy.config import ModelOptions
from autodeploy.errors import CheckpointError, ConfigError, ModelNotFoundError, UnsupportedModelError
from autodeploy.models import resolve
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
    assert (resolved.name, resolved.folder, resolved.config.model_type) == ("tiny-model", folder, "llama")
    assert resolved.weight_files == (folder / "model.safetensors",)
    assert resolved.dtype == torch.float32
    assert resolved.eos_token_ids == (tiny.EOS,)
    assert resolved.max_model_len == tiny.MAX_LENGTH
    assert resolved.generation_defaults == {}


def test_a_gguf_file_becomes_a_folder_in_bfloat16(
    monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "tiny.GGUF").write_bytes(b"GGUF")
    asked: list[tuple[Path, torch.dtype]] = []
    monkeypatch.setattr(resolve, "transcribe_gguf", lambda path, dtype: asked.append((path, dtype)) or folder)
    assert resolve_model(str(tmp_path / "tiny.GGUF"), ModelOptions()).folder == folder
    resolve_model(str(tmp_path / "tiny.GGUF"), ModelOptions(dtype="float32"))
    assert asked == [(tmp_path / "tiny.GGUF", torch.bfloat16), (tmp_path / "tiny.GGUF", torch.float32)]


def test_a_hub_id_is_downloaded_at_its_revision_without_code(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(resolve, "snapshot_download", lambda repo, **given: calls.append((repo, given)) or str(folder))
    resolved = resolve_model("owner/name", ModelOptions(revision="v1"))
    assert (resolved.name, resolved.folder) == ("owner/name", folder)
    assert (calls[0][0], calls[0][1]["revision"]) == ("owner/name", "v1")
    assert not any("*.py" in pattern or "bin" in pattern for pattern in calls[0][1]["allow_patterns"])
    resolve_model("owner/name", ModelOptions(trust_remote_code=True))
    assert "*.py" in calls[1][1]["allow_patterns"]


def _no_network(*args: object, **given: object) -> str:
    raise LocalEntryNotFoundError("no connection and not in the cache")


def _no_such_repository(*args: object, **given: object) -> str:
    response = httpx.Response(404, request=httpx.Request("GET", "https://huggingface.co"))
    raise RepositoryNotFoundError("404 Client Error", response=response)


@pytest.mark.parametrize("download", [_no_network, _no_such_repository])
def test_a_hub_id_that_cannot_be_had_says_what_was_tried(monkeypatch: pytest.MonkeyPatch, download: Any) -> None:
    monkeypatch.setattr(resolve, "snapshot_download", download)
    with pytest.raises(ModelNotFoundError, match=r"'owner/name' is not a folder.*hub at revision 'v1'.*network"):
        resolve_model("owner/name", ModelOptions(revision="v1"))


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing here", "gone.gguf", "owner/gone.gguf", "a/b/c", ""])
def test_a_path_that_does_not_exist_is_never_looked_up(
    monkeypatch: pytest.MonkeyPatch, name: str, tmp_path: Path
) -> None:
    monkeypatch.setattr(resolve, "snapshot_download", lambda *args, **given: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ModelNotFoundError, CheckpointError)):
        resolve_model(name, ModelOptions())


def test_a_file_that_is_no_gguf_points_to_its_folder(folder: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="give the checkpoint folder"):
        resolve_model(str(folder / "config.json"), ModelOptions())


def test_a_folder_without_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json; is it the folder of a checkpoint"):
        resolve_model(str(folder), ModelOptions())
    (folder / "some.gguf").touch()
    with pytest.raises(CheckpointError, match=r"give the file itself.*some\.gguf"):
        resolve_model(str(folder), ModelOptions())


@pytest.mark.parametrize("content", ["{", "[]", '{"model_type": "llama", "num_hidden_layers": "three"}'])
def test_a_damaged_config_is_named(folder: Path, content: str) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"config\.json"):
        resolve_model(str(folder), ModelOptions())


def test_a_config_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has a config but no weights.*load_format='dummy'"):
        resolve_model(str(folder), ModelOptions())
    assert resolve_model(str(folder), ModelOptions(load_format="dummy")).weight_files == ()


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
    assert resolved.generation_defaults == {"temperature": 0.6, "top_p": 0.9}
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
