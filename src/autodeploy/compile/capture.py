"""Capture: work of a device is recorded as it is launched, and repeated without Python.

`CudaCapture` is the device's own. `debug/capture_checker.py` stands in for it on a CPU.
"""

import contextlib
import functools
import logging
from collections.abc import Callable
from typing import Protocol

import torch

logger = logging.getLogger(__name__)

Work = Callable[[], None]
"""Launches kernels that read and write tensors which stay where they are, and leaves nothing else behind."""

_TIMED = 10
"""Repetitions that are timed together."""


class Capture(Protocol):
    """What captures the graphs of one program; they share one pool of memory, so that no two may run at a time."""

    def warm_up(self, work: Work) -> None:
        """Do the work once, so that what is done at a first call (compiling, measuring) is not done in a capture."""

    def record(self, work: Work) -> Work:
        """Record the work; what is returned repeats it, on the values that are there then.

        Raises:
            RuntimeError: it cannot be captured, with the reason.
        """

    def seconds(self, repeat: Work) -> float:
        """Time that the device takes to repeat a work, when it is done several times."""

    def used_bytes(self) -> int:
        """Memory of the device that is in use, in bytes, with what its allocator keeps for graphs and nothing else."""


class CudaCapture:
    """CUDA graphs on a device.

    Works are captured on a stream of their own, and repeated on whichever is current then.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._start()

    def _start(self) -> None:
        self._stream = torch.cuda.Stream(self._device)
        self._pool = torch.cuda.graph_pool_handle()

    def warm_up(self, work: Work) -> None:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            work()
        current.wait_stream(self._stream)
        torch.cuda.synchronize(self._device)

    def record(self, work: Work) -> Work:
        try:
            return self._captured(work)
        except BaseException:
            self._start()
            # torch 2.11 leaves its generator of random numbers in a capture that failed, until one succeeds.
            with contextlib.suppress(RuntimeError):
                self._captured(lambda: _nothing(self._device))
            raise

    def _captured(self, work: Work) -> Work:
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self._device)
        # Not `torch.cuda.graph`, which collects garbage and empties caches each time: there are hundreds of captures.
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
                graph.capture_end()
            except BaseException:
                self._end(graph)
                raise
        replay: Work = graph.replay
        return replay

    def _end(self, graph: torch.cuda.CUDAGraph) -> None:
        """End a capture that failed; that it failed is known."""
        # Where a capture cannot be ended, torch before 2.13 leaves its allocator in it (pytorch/pytorch#180395), which
        # then refuses to empty its caches. Later ones have nothing to end there, and say so.
        pool = (self._stream.device_index, self._pool)
        for end in (graph.capture_end, functools.partial(torch._C._cuda_endAllocateToPool, *pool)):
            try:
                end()
            except RuntimeError as error:
                logger.debug("capture: %s", error)

    def seconds(self, repeat: Work) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        repeat()
        start.record(torch.cuda.current_stream(self._device))
        for _ in range(_TIMED):
            repeat()
        end.record(torch.cuda.current_stream(self._device))
        end.synchronize()
        return float(start.elapsed_time(end)) / 1000 / _TIMED

    def used_bytes(self) -> int:
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self._device)
        return int(total - free)


def _nothing(device: torch.device) -> None:
    """The least that a graph can have."""
    torch.zeros(1, device=device)
