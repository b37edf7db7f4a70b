"""Every configuration of a Triton kernel gives what the op gives; other tests run the first alone."""

import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from autodeploy.kernels import provider
from autodeploy.ops import OPS, Op
from tests.kernels.triton.sizes import SIZES
from tests.ops.laws import Replay

launch = pytest.importorskip("autodeploy.kernels.triton.launch", reason="needs Triton")

CUDA = torch.device("cuda")
IS_INTERPRETED = not provider.unavailable(CUDA) and not torch.cuda.is_available()
pytestmark = pytest.mark.skipif(not IS_INTERPRETED, reason="runs in Triton's interpreter, on CPU tensors")

provider.priority(CUDA)
LAUNCHERS = [
    value
    for name, module in list(sys.modules.items())
    if name.startswith("autodeploy.kernels.triton.")
    for value in vars(module).values()
    if isinstance(value, launch.Launcher) and len(value.configurations) > 1
]


def launched(name: str) -> list[Any]:
    """What has a choice among what an op's kernel launches at real sizes."""
    with launch.written_down() as found:
        for arguments in SIZES[name]():
            OPS[name].kernels["triton"].function(**arguments)
    return [each.kernel for each in found if len(each.kernel.configurations) > 1]


TUNED = [OPS[name] for name in SIZES if "triton" in OPS[name].kernels and launched(name)]
OTHERS = [
    (op, place) for op in TUNED for place in range(1, max(len(each.configurations) for each in launched(op.name)))
]


def check(op: Op, num_samples: int) -> None:
    """Against the op, and where that is a cached one against the op that it is the twin of."""
    torch.manual_seed(0)
    kernel = op.kernels["triton"]
    source = next((other for other in OPS.values() if other.cached is op), op)
    assert source.samples is not None
    tolerance = source.tolerance[torch.float32]
    for sample in source.samples()[:num_samples]:
        expected = source.reference(**sample)
        if source is op:
            found = kernel.function(**sample)
        else:
            twin = dataclasses.replace(op, overload=kernel.function)
            found = Replay(dataclasses.replace(source, cached=twin), sample, 0).run()
        torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


def test_every_launcher_is_launched_here() -> None:
    found = {launcher for op in TUNED for launcher in launched(op.name)}
    assert found == set(LAUNCHERS) and len(found) > 10


def test_what_a_choice_is_made_for_is_given() -> None:
    for launcher in LAUNCHERS:
        assert launcher.key and {*launcher.key, *launcher.restored, *launcher.restored.values()} <= set(
            launcher.function.arg_names
        )


@pytest.mark.slow
@pytest.mark.parametrize(("op", "place"), OTHERS, ids=lambda value: getattr(value, "name", value))
def test_gives_what_the_op_gives(op: Op, place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for launcher in LAUNCHERS:
        own = launcher.configurations
        monkeypatch.setattr(launcher, "configurations", own[place % len(own) :])
    check(op, num_samples=6 if op.samples is not None else 2)


@pytest.mark.slow
@pytest.mark.parametrize("op", TUNED, ids=lambda op: op.name)
def test_measuring_leaves_nothing_behind(op: Op, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from tests.kernels.triton.measured import tuned_on_the_cpu

    bench = tuned_on_the_cpu(monkeypatch, tmp_path)
    check(op, num_samples=1)
    assert bench.num_measured > 1
