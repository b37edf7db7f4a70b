"""CudaCapture over a stand-in for CUDA: a capture that failed is ended, for the allocator too."""

import contextlib
import itertools
from types import SimpleNamespace

import pytest
import torch

from autodeploy.compile import capture
from autodeploy.compile.capture import CudaCapture

Pool = tuple[int, int]


class Cuda:
    """Graphs, an allocator that knows which captures are under way, and a generator that waits for them to end.

    Args:
        tells_first: whether a capture that cannot be ended tells the allocator so before it says so.

    Attributes:
        broken: the capture under way cannot be ended.
    """

    def __init__(self, patch: pytest.MonkeyPatch, *, tells_first: bool) -> None:
        self.underway: list[Pool] = []
        self.broken = self.generator_waits = False
        self.tells_first = tells_first
        numbers = itertools.count(1)
        patch.setattr(torch.cuda, "Stream", lambda device: SimpleNamespace(device_index=device.index))
        patch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        patch.setattr(torch.cuda, "synchronize", lambda device: None)
        patch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, next(numbers)))
        patch.setattr(torch.cuda, "CUDAGraph", lambda: Graph(self))
        patch.setattr(capture, "_nothing", lambda device: None)
        patch.setattr(torch._C, "_cuda_endAllocateToPool", self.end_allocating, raising=False)

    def end_allocating(self, device_index: int, pool: Pool) -> None:
        assert device_index == 1
        if pool not in self.underway:
            raise RuntimeError("not currently recording to this pool")
        self.underway.remove(pool)


class Graph:
    def __init__(self, cuda: Cuda) -> None:
        self._cuda, self._is_broken = cuda, False

    def capture_begin(self, pool: Pool, capture_error_mode: str) -> None:
        self._pool, self._cuda.generator_waits = pool, True
        self._cuda.underway.append(pool)

    def capture_end(self) -> None:
        self._is_broken, self._cuda.broken = self._is_broken or self._cuda.broken, False
        if self._cuda.tells_first or not self._is_broken:
            self._cuda.end_allocating(1, self._pool)
        if self._is_broken:
            raise RuntimeError("operation failed due to a previous error during capture")
        self._cuda.generator_waits = False

    def replay(self) -> None:
        """Nothing to repeat."""


@pytest.mark.parametrize("tells_first", [False, True])
def test_a_failed_capture_is_under_way_no_more(tells_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda(monkeypatch, tells_first=tells_first)
    own, pools = CudaCapture(torch.device("cuda", 1)), []

    def fails() -> None:
        pools.extend(cuda.underway)
        cuda.broken = True
        raise ValueError("a wait for the device")

    with pytest.raises(ValueError, match="a wait"):
        own.record(fails)
    assert not cuda.underway and not cuda.generator_waits
    own.record(lambda: pools.extend(cuda.underway))
    assert not cuda.underway and len(set(pools)) == 2


def test_what_fails_at_its_end_is_too(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = Cuda(monkeypatch, tells_first=False)
    cuda.broken = True
    with pytest.raises(RuntimeError, match="previous error"):
        CudaCapture(torch.device("cuda", 1)).record(lambda: None)
    assert not cuda.underway and not cuda.generator_waits
