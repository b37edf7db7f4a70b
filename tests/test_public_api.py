"""The public names: importable, light to import, and the same for type checkers."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import autodeploy

STUB = Path(autodeploy.__file__).with_suffix(".pyi")


@pytest.mark.parametrize("name", autodeploy.__all__)
def test_every_public_name_exists(name: str) -> None:
    assert getattr(autodeploy, name) is not None
    assert name in dir(autodeploy)


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(STUB.read_text(encoding="utf-8"))
    imported = {
        alias.asname: node.module for node in tree.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert imported == autodeploy._HOMES


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'LLMs'"):
        _ = autodeploy.LLMs  # type: ignore[attr-defined]


def test_build_stays_a_function_after_its_module_is_imported() -> None:
    import autodeploy.build
    from autodeploy.build import build

    assert callable(autodeploy.build)
    assert autodeploy.build is build


def test_importing_the_package_is_light() -> None:
    code = "import sys, autodeploy, autodeploy.cli; print([m for m in ('torch', 'transformers') if m in sys.modules])"
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert done.stdout.strip() == "[]"
