"""Launches in measured configurations, without a device: what is measured when, and what measuring leaves behind."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from autodeploy.kernels import provider

pytest.importorskip("triton", reason="needs Triton")

import triton
import triton.language as tl

from autodeploy.kernels.triton.launch import Launcher
from tests.kernels.triton.measured import Bench, tuned_on_the_cpu

CUDA = torch.device("cuda")
IS_INTERPRETED = not provider.unavailable(CUDA) and not torch.cuda.is_available()

pytestmark = pytest.mark.skipif(not IS_INTERPRETED, reason="runs in Triton's interpreter, on CPU tensors")


@triton.jit(do_not_specialize=["ROWS_KEY"])
def _add_up(x, sums, rows, out, ROWS_KEY, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    row = tl.program_id(0)
    place = sums + tl.load(rows + row) * WIDTH + column
    mask = column < WIDTH
    total = tl.load(place, mask=mask) + tl.load(x + row * WIDTH + column, mask=mask)
    tl.store(place, total, mask=mask)
    tl.store(out + row * WIDTH + column, total, mask=mask)


def launcher(**facts: Any) -> Launcher:
    blocks = [triton.Config({"BLOCK": block}) for block in (4, 8, 16)]
    return Launcher(_add_up, blocks, key=("WIDTH", "ROWS_KEY"), **facts)


def launch(add_up: Launcher, rows_key: int = 1) -> tuple[Tensor, Tensor]:
    """Sums after they were added to, and the results."""
    x, rows = torch.arange(20.0).view(2, 10), torch.tensor([2, 0], dtype=torch.int32)
    sums, out = torch.full((4, 10), 100.0), torch.zeros(2, 10)
    add_up(lambda values: (2, -(-10 // values["BLOCK"])), x, sums, rows, out, ROWS_KEY=rows_key, WIDTH=10)
    return sums, out


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Bench:
    return tuned_on_the_cpu(monkeypatch, tmp_path)


def test_the_fastest_runs_and_is_measured_once_for_a_key(bench: Bench) -> None:
    bench.milliseconds = [3.0, 1.0, 2.0]
    add_up = launcher(restored={"sums": "rows"})
    for _ in range(2):
        launch(add_up)
    assert [one.kwargs["BLOCK"] for one in bench.ran] == [4, 4, 8, 8, 16, 16, 8, 8], "each twice, then the best"
    launch(add_up, rows_key=2)
    assert bench.num_measured == 6
    again = launcher(restored={"sums": "rows"})
    launch(again)
    assert bench.num_measured == 6 and bench.ran[-1].kwargs["BLOCK"] == 8, "kept in the cache directory"


def test_what_is_restored_is_added_to_once(bench: Bench) -> None:
    expected = launch(Launcher(_add_up, [triton.Config({"BLOCK": 16})]))
    for found, right in zip(launch(launcher(restored={"sums": "rows"})), expected, strict=True):
        assert torch.equal(found, right)
    assert bench.num_measured == 3
    forgotten, _ = launch(launcher(), rows_key=2)
    assert not torch.equal(forgotten, expected[0]), "which needs to be said"


def test_sums_are_restored_though_measuring_fails(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    add_up, sums = launcher(restored={"sums": "rows"}), torch.ones(4, 10)
    bench.milliseconds = []
    given = (torch.ones(2, 10), sums, torch.tensor([1, 1]), torch.zeros(2, 10))
    with pytest.raises(IndexError):
        add_up((2, 3), *given, ROWS_KEY=1, WIDTH=10)
    assert torch.equal(sums, torch.ones(4, 10)) and bench.ran


def test_nothing_is_measured_while_a_graph_is_captured(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    bench.milliseconds = [3.0, 2.0, 1.0]
    add_up = launcher(restored={"sums": "rows"})
    with capturing(monkeypatch):
        launch(add_up)
    assert bench.num_measured == 0 and bench.ran[-1].kwargs["BLOCK"] == 4
    launch(add_up)
    with capturing(monkeypatch):
        launch(add_up)
    assert bench.num_measured == 3 and bench.ran[-1].kwargs["BLOCK"] == 16, "what was measured before is known"


@contextlib.contextmanager
def capturing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        yield
