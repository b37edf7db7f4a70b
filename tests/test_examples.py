"""Every example runs: on a tiny model where it takes a model, by itself where it does not."""

import importlib.util
import inspect
from pathlib import Path

import pytest

from tests import tiny

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("llama"))


RAY = {"ray_replicas"}
"""Examples that start processes of Ray; tests/test_ray.py has an application of the same form."""


@pytest.mark.parametrize("path", [path for path in EXAMPLES if path.stem not in RAY], ids=lambda path: path.stem)
def test_it_runs_and_says_something(path: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main(*[str(folder)] * len(inspect.signature(module.main).parameters))
    assert capsys.readouterr().out.strip()
