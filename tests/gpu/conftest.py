"""What tests on CUDA get: kernels in their first configuration."""

from typing import Any

import pytest

from autodeploy.kernels import triton


@pytest.fixture(autouse=True)
def _first_configurations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiling and timing all of them for each tiny size takes an hour, and says nothing of real ones. A test that
    wants it asks for `tuning`.
    """
    if triton.why_unavailable() is None:
        from autodeploy.kernels.triton.launch import Launcher

        def first(launcher: Any, *_: object) -> Any:
            return launcher.configurations[0]

        monkeypatch.setattr(Launcher, "_configuration", first)


@pytest.fixture
def tuning(_first_configurations: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Configurations are measured, as they are for a user."""
    monkeypatch.undo()
