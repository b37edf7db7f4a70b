"""Every Triton kernel compiles for CUDA devices by being registered, at real sizes, within what the devices have."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from autodeploy.kernels import provider, triton
from autodeploy.ops import OPS
from tests.kernels.triton.sizes import SIZES

ROOT = Path(__file__).parents[3]
CUDA = torch.device("cuda")
PRIORITY = provider.priority(CUDA)
NAMES = [name for name, op in OPS.items() for kernel in op.kernels if kernel in PRIORITY]
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10}
"""Of a thread block, by compute capability (CUDA programming guide, technical specifications)."""
NEWEST = max(SHARED_BYTES)
SPILLED_BYTES = {"_ssd_chunks": 128, "_go_through_chunks": 512, "_solve_chunks": 96, "_choose": 64}
SPILLED_BYTES |= {"_attend": 8, "_attend_latents": 48}
"""What chunks of recurrences, choices of tokens, and attention to keys in 8 bits keep in local memory: mostly what
stays as it is in a loop.
"""
MOST_SPILLED_BYTES = 640
"""The same at unusual sizes: a chunk of a scan with 256 entries keeps most."""

pytestmark = pytest.mark.skipif(bool(provider.unavailable(CUDA)), reason=str(provider.unavailable(CUDA)))


Launches = dict[str, list[dict[str, Any]]]


def compiled(cache: Path, *options: str) -> Any:
    """What the module `compiled` prints: what each launch takes, by op."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), str(ROOT)])}
    command = [sys.executable, "-W", "error", "-m", "tests.kernels.triton.compiled", *options]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1200)
    assert run.returncode == 0, run.stderr[-5000:]
    return json.loads(run.stdout)


@pytest.fixture(scope="session")
def defaults(tmp_path_factory: pytest.TempPathFactory) -> Launches:
    """The first configuration of each, for the newest devices; compiling for the others takes as long again."""
    found: Launches = compiled(tmp_path_factory.mktemp("triton"), str(NEWEST))
    return found


def test_every_kernel_has_sizes() -> None:
    assert set(SIZES) == set(NAMES) and "rms_norm" in SIZES


def test_every_op_of_a_lowered_graph_has_a_kernel_or_a_reason() -> None:
    own = {name: op for name, op in OPS.items() if op.reference.__module__.startswith("autodeploy.")}  # not the tests'
    lowered = {name: op for name, op in own.items() if op.states is None and not name.startswith("captured_")}
    without = {name for name, op in lowered.items() if triton.PROVIDER not in op.kernels}
    assert without == {"linear", "quantized_embedding", "cached_keep_rows", "cached_recurrence"}
    assert all(f"`{name}`" in (triton.__doc__ or "") for name in without)


def check(launches: list[dict[str, Any]], *capabilities: int) -> None:
    assert NEWEST in {launch["capability"] for launch in launches} <= set(capabilities)
    for launch in launches:
        assert launch["shared_bytes"] <= SHARED_BYTES[launch["capability"]], launch
        most = SPILLED_BYTES.get(launch["function"], 0) if launch["is_usual"] else MOST_SPILLED_BYTES
        assert launch["local_bytes"] <= most, f"registers are spilled: {launch}"


@pytest.mark.parametrize("name", NAMES)
def test_fits_the_devices(name: str, defaults: Launches) -> None:
    check(defaults[name], NEWEST)


VARIANTS = {"_attend": 2, "_attend_latents": 2, "_attend_listed": 2, "_combine": 5, "_expert_rows": 4, "_rows": 2}
VARIANTS |= {"_score": 2, "_list_best": 4, "_write_entries": 2}
"""Kernels that are compiled more than once for one model: with a context in one part or several; for parts by their
number; for tokens that are sorted by expert and not, and both products; for one row; for scores of blocks in rows of
some lengths; for keys with values and without.
"""


def test_steps_of_any_size_need_few_kernels(tmp_path: Path) -> None:
    """Each of them is compiled while somebody waits."""
    for launches in compiled(tmp_path, "--variants").values():
        assert all(count <= VARIANTS.get(function, 1) for function, count in launches.items()), launches


@pytest.mark.slow
def test_every_configuration_fits_the_devices(tmp_path: Path) -> None:
    found = compiled(tmp_path, "--every", *map(str, SHARED_BYTES))
    assert set(found) == set(NAMES)
    for launches in found.values():
        check(launches, *SHARED_BYTES)
