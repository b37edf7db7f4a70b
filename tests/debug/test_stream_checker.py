"""The checker of streams refuses what would be a race on a device, and nothing else."""

from collections.abc import Callable

import pytest
import torch

from autodeploy.debug.stream_checker import Race, StreamChecker


def in_order(streams: StreamChecker) -> float:
    x = torch.ones(4) * 2
    with streams.beside():
        y = x + 1
    z = x * 3
    streams.join()
    return float((y + z).sum())


def read_too_early(streams: StreamChecker) -> None:
    with streams.beside():
        y = torch.ones(4) + 1
    y.neg()


def written_while_read(streams: StreamChecker) -> None:
    x = torch.ones(4) * 2
    with streams.beside():
        y = x + 1
    x.mul_(3)
    streams.join()
    y.neg()


def given_back_while_read(streams: StreamChecker) -> None:
    x = torch.ones(4) * 2
    with streams.beside():
        y = x + 1
    del x
    torch.ones(4)
    streams.join()
    y.neg()


def used_anew_while_read(streams: StreamChecker) -> None:
    """What the second stream made may be used anew by it when the first one has been waited for."""
    with streams.beside():
        y = torch.ones(4) + 1
    streams.join()
    z = y.neg()
    del y
    with streams.beside():
        z = z + 1
    streams.join()
    z.neg()


def test_what_is_waited_for_passes() -> None:
    with StreamChecker() as streams:
        assert in_order(streams) == 4 * (3 + 6)
        used_anew_while_read(streams)
        assert streams.num_branches == 3


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (read_too_early, r"aten.neg.default reads what aten.add.Tensor has made"),
        (written_while_read, r"aten.mul_.Tensor writes what aten.mul.Tensor has made"),
        (given_back_while_read, r"aten.ones.default may be given the memory of what aten.mul.Tensor has made"),
    ],
)
def test_races_are_refused(work: Callable[[StreamChecker], None], message: str) -> None:
    with StreamChecker() as streams, pytest.raises(Race, match=message):
        work(streams)
