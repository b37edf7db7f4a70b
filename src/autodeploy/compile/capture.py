"""Capture: work of a device is recorded as it is launched, and repeated without Python.

`CudaCapture` is the device's own. `debug/capture_checker.py` stands in for it on a CPU.
"""

import logging
from collections.abc import Callable
from typing import Protocol

import torch

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
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self._device)
        # Not `torch.cuda.graph`, which collects garbage and empties caches each time: there are hundreds of captures.
        with torch.cuda.stream(self._stream):
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                work()
            except BaseException:
                _end(graph)
                self._start()  # the allocator may take the failed capture for one that is still under way
                raise
            graph.capture_end()
        replay: Work = graph.replay
        return replay

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


def _end(graph: torch.cuda.CUDAGraph) -> None:
    """End a capture that failed; that it failed is known."""
    try:
        graph.capture_end()
    except RuntimeError as error:
        logging.getLogger(__name__).debug("capture: %s", error)
