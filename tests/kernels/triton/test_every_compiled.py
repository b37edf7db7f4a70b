"""Every Triton kernel compiles for CUDA devices by being registered, at real sizes, within what the devices have."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from autodeploy.kernels import provider
from autodeploy.ops import OPS
from tests.kernels.triton.sizes import SIZES

ROOT = Path(__file__).parents[3]
CUDA = torch.device("cuda")
PRIORITY = provider.priority(CUDA)
NAMES = [name for name, op in OPS.items() for kernel in op.kernels if kernel in PRIORITY]
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10}
"""Of a thread block, by compute capability (CUDA programming guide, technical specifications)."""

pytestmark = pytest.mark.skipif(bool(provider.unavailable(CUDA)), reason=str(provider.unavailable(CUDA)))


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What each launch takes, by op."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {
        "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)]),
    }
    command = [sys.executable, "-W", "error", "-m", "tests.kernels.triton.compiled"]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-5000:]
    found: dict[str, list[dict[str, Any]]] = json.loads(run.stdout)
    return found


def test_every_kernel_has_sizes() -> None:
    assert set(SIZES) == set(NAMES) and "rms_norm" in SIZES


@pytest.mark.parametrize("name", NAMES)
def test_fits_the_devices(name: str, compiled: dict[str, list[dict[str, Any]]]) -> None:
    launches = compiled[name]
    assert {launch["capability"] for launch in launches} == set(SHARED_BYTES)
    for launch in launches:
        assert launch["shared_bytes"] <= SHARED_BYTES[launch["capability"]], launch
        assert launch["local_bytes"] == 0 or not launch["is_default"], f"registers are spilled: {launch}"
