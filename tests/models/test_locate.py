import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError, RepositoryNotFoundError

from autodeploy.config import ModelOptions
from autodeploy.errors import CheckpointError, ModelNotFoundError
from autodeploy.models import locate
from autodeploy.models.locate import locate_model
from tests import tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny.save("llama", tmp_path / "tiny-model")


def test_a_folder(folder: Path) -> None:
    located = locate_model(str(folder), ModelOptions())
    assert (located.name, located.folder, located.config["model_type"]) == ("tiny-model", folder, "llama")
    assert located.weight_files == (folder / "model.safetensors",)
    assert located.generation_defaults == {}


def test_locating_imports_no_transformers(folder: Path) -> None:
    code = (
        "import sys; from autodeploy.config import ModelOptions; from autodeploy.models.locate import locate_model;"
        f"locate_model({str(folder)!r}, ModelOptions()); sys.exit('transformers' in sys.modules)"
    )
    assert (
        subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
        ).returncode
        == 0
    )


def test_a_gguf_file_becomes_a_folder_in_bfloat16(
    monkeypatch: pytest.MonkeyPatch, folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "tiny.GGUF").write_bytes(b"GGUF")
    asked: list[tuple[Path, torch.dtype]] = []
    monkeypatch.setattr(locate, "transcribe_gguf", lambda path, dtype: asked.append((path, dtype)) or folder)
    assert locate_model(str(tmp_path / "tiny.GGUF"), ModelOptions()).folder == folder
    locate_model(str(tmp_path / "tiny.GGUF"), ModelOptions(dtype="float32"))
    assert asked == [(tmp_path / "tiny.GGUF", torch.bfloat16), (tmp_path / "tiny.GGUF", torch.float32)]


def test_a_hub_id_is_downloaded_at_its_revision_without_code(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda repo, **given: calls.append((repo, given)) or str(folder)
    )
    located = locate_model("owner/name", ModelOptions(revision="v1"))
    assert (located.name, located.folder) == ("owner/name", folder)
    assert (calls[0][0], calls[0][1]["revision"]) == ("owner/name", "v1")
    assert not any("*.py" in pattern or "bin" in pattern for pattern in calls[0][1]["allow_patterns"])
    locate_model("owner/name", ModelOptions(trust_remote_code=True))
    assert "*.py" in calls[1][1]["allow_patterns"]


def _no_network(*args: object, **given: object) -> str:
    raise LocalEntryNotFoundError("no connection and not in the cache")


def _no_such_repository(*args: object, **given: object) -> str:
    response = httpx.Response(404, request=httpx.Request("GET", "https://huggingface.co"))
    raise RepositoryNotFoundError("404 Client Error", response=response)


@pytest.mark.parametrize("download", [_no_network, _no_such_repository])
def test_a_hub_id_that_cannot_be_had_says_what_was_tried(monkeypatch: pytest.MonkeyPatch, download: Any) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(ModelNotFoundError, match=r"'owner/name' is not a folder.*hub at revision 'v1'.*network"):
        locate_model("owner/name", ModelOptions(revision="v1"))


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing here", "gone.gguf", "owner/gone.gguf", "a/b/c", ""])
def test_a_path_that_does_not_exist_is_never_looked_up(
    monkeypatch: pytest.MonkeyPatch, name: str, tmp_path: Path
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *args, **given: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises((ModelNotFoundError, CheckpointError)):
        locate_model(name, ModelOptions())


def test_a_file_that_is_no_gguf_points_to_its_folder(folder: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="give the checkpoint folder"):
        locate_model(str(folder / "config.json"), ModelOptions())


def test_a_folder_without_config(folder: Path) -> None:
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json; is it the folder of a checkpoint"):
        locate_model(str(folder), ModelOptions())
    (folder / "some.gguf").touch()
    with pytest.raises(CheckpointError, match=r"give the file itself.*some\.gguf"):
        locate_model(str(folder), ModelOptions())


def test_a_config_without_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"has a config but no weights.*load_format='dummy'"):
        locate_model(str(folder), ModelOptions())
    assert locate_model(str(folder), ModelOptions(load_format="dummy")).weight_files == ()
