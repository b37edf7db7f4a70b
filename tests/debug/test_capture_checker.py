"""The checker refuses what a device would refuse to capture, and notices what a device would get wrong."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from autodeploy.debug.capture_checker import CaptureChecker

KEPT: list[Tensor] = []

REFUSED: dict[str, Callable[[Tensor], Any]] = {
    "tolist": lambda x: x.tolist(),
    "item": lambda x: x.sum().item(),
    "numpy": lambda x: x.numpy(),
    "bool": lambda x: bool(x.sum() > 3),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "from a list": lambda x: x + torch.tensor([1.0, 2.0, 3.0]),
    "index by a list": lambda x: x[[0, 2]],
    "kept memory": lambda x: KEPT.append(x * 2),
}


@pytest.mark.parametrize("work", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_captured_is_refused(work: Callable[[Tensor], Any]) -> None:
    x = torch.ones(3)

    def refused() -> None:
        work(x)

    with pytest.raises(RuntimeError, match="a device would not capture this step"):
        CaptureChecker().record(refused)
    KEPT.clear()


def test_a_work_is_repeated_on_the_values_that_are_there() -> None:
    x, index, out = torch.ones(3), torch.tensor([2, 0]), torch.zeros(2)

    def work() -> None:
        scratch = torch.empty_like(x).copy_(x)
        out.copy_((scratch * 2 + torch.arange(3))[index])

    replay = CaptureChecker().record(work)
    for value in (1.0, 5.0):
        x.fill_(value)
        replay()
        assert out.tolist() == [2 * value + 2, 2 * value]


@pytest.mark.parametrize("changed", ["a number", "a shape", "an address", "a call"])
def test_what_a_device_would_not_notice_is_an_error(changed: str) -> None:
    x, out = torch.ones(4), torch.zeros(4)
    now: dict[str, Any] = {"factor": 2.0, "size": 2, "given": torch.ones(4), "twice": False}

    def work() -> None:
        out[: now["size"]].copy_((x * now["factor"] + now["given"])[: now["size"]])
        if now["twice"]:
            out.add_(1)

    replay = CaptureChecker().record(work)
    replay()
    now |= {
        "a number": {"factor": 3.0},
        "a shape": {"size": 3},
        "an address": {"given": torch.zeros(4)},
        "a call": {"twice": True},
    }[changed]
    with pytest.raises(RuntimeError, match="when it was captured and is"):
        replay()


def test_memory_that_only_lives_in_the_work_may_move() -> None:
    x, out, held = torch.ones(64), torch.zeros(64), list[Tensor]()

    def work() -> None:
        out.copy_((x + 1) * 2)

    replay = CaptureChecker().record(work)
    for _ in range(4):
        held.append(torch.ones(64))
        replay()
    assert out.sum() == 64 * 4
