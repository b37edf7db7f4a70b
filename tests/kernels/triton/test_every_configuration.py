"""Every configuration of a Triton kernel gives what the op gives; other tests run the first alone."""

from typing import Any

import pytest
import torch

from autodeploy.kernels import provider
from autodeploy.ops import OPS, Kernel, Op

launch = pytest.importorskip("autodeploy.kernels.triton.launch", reason="needs Triton")

provider.priority(torch.device("cuda"))
KERNELS = [(op, op.kernels["triton"]) for op in OPS.values() if "triton" in op.kernels and op.samples is not None]


def tuned_launchers(kernel: Kernel, sample: dict[str, Any]) -> list[Any]:
    """Those of a call that have a choice."""
    with launch.written_down() as launches:
        kernel.function(**sample)
    return [found.kernel for found in launches if len(found.kernel.configurations) > 1]


@pytest.mark.slow
@pytest.mark.parametrize(("op", "kernel"), KERNELS, ids=[op.name for op, _ in KERNELS])
def test_gives_what_the_op_gives(op: Op, kernel: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    assert op.samples is not None
    for sample in op.samples()[:6]:
        expected = op.reference(**sample)
        launchers = list(dict.fromkeys(tuned_launchers(kernel, sample)))
        for place in range(1, max((len(one.configurations) for one in launchers), default=1)):
            with monkeypatch.context() as patch:
                for one in launchers:
                    patch.setattr(one, "configurations", one.configurations[place % len(one.configurations) :])
                found = kernel.function(**sample)
            torch.testing.assert_close(
                found, expected, rtol=op.tolerance[torch.float32], atol=op.tolerance[torch.float32]
            )
