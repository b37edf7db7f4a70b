"""The limits of this machine, measured in about three seconds: a device and a dtype in; GB/s and GFLOP/s out.

A benchmark's share of these limits tells how much is left to gain. They are measured beside each benchmark, not looked
up, because a shared machine does not have the same limits every hour.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

CPU_BUFFER_BYTES = 512 * 2**20
CUDA_BUFFER_BYTES = 4 * 2**30


@dataclass(frozen=True, kw_only=True)
class MachineLimits:
    """What the device reaches at most.

    Attributes:
        memory_gb_per_second: 10⁹ bytes read per second (on CUDA read and written, by a copy), best of several passes.
        matmul_gflop_per_second: 10⁹ floating-point operations per second of a square matrix product in `dtype`, on a
            CPU in float32 where that is faster.
        matmul_size: rows and columns of that product.
    """

    device: str
    dtype: str
    threads: int
    memory_gb_per_second: float
    matmul_gflop_per_second: float
    matmul_size: int


def measure(device: torch.device, dtype: torch.dtype, seconds: float = 3.0) -> MachineLimits:
    """Measure memory and matrix rate, in about `seconds` altogether and with all threads torch may use."""
    memory = _memory_rate(device, seconds / 2)
    # What a processor does not multiply in `dtype` it can multiply in float32, and a good kernel does.
    dtypes = {dtype, torch.float32} if device.type == "cpu" else {dtype}
    size, matmul = max(
        (_matmul_rate(device, one, seconds / 2 / len(dtypes)) for one in dtypes), key=lambda rate: rate[1]
    )
    return MachineLimits(
        device=device.type,
        dtype=str(dtype).removeprefix("torch."),
        threads=torch.get_num_threads(),
        memory_gb_per_second=memory / 1e9,
        matmul_gflop_per_second=matmul / 1e9,
        matmul_size=size,
    )


def _memory_rate(device: torch.device, seconds: float) -> float:
    """Bytes per second through a buffer much larger than any cache."""
    if device.type == "cuda":
        num_bytes = min(CUDA_BUFFER_BYTES, torch.cuda.mem_get_info(device)[0] // 4)  # states may have most of it
        source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        # A copy moves every byte twice.
        return 2 * num_bytes / _fastest(lambda: target.copy_(source), device, seconds)
    # A sum is one vectorised read of everything. `ones`, not `empty`: untouched pages would all be the same zero page.
    buffer = torch.ones(CPU_BUFFER_BYTES // 8, dtype=torch.int64, device=device)
    return buffer.nbytes / _fastest(buffer.sum, device, seconds)


def _matmul_rate(device: torch.device, dtype: torch.dtype, seconds: float) -> tuple[int, float]:
    """Size of the product and its operations per second; the size grows for as long as the time allows."""
    best_size, best_rate = 0, 0.0
    deadline = time.perf_counter() + seconds
    for size in (512, 1024, 2048, 4096, 8192):
        # The last rate tells how long a product eight times the work will take; a slow dtype stops early.
        remaining = deadline - time.perf_counter()
        if best_rate and 4 * 2 * size**3 / best_rate > remaining:
            break
        left, right = torch.randn(2, size, size, device=device).to(dtype).unbind()
        # `linear`, as models multiply: some dtypes have a fast path for a transposed right side only.
        product = partial(torch.nn.functional.linear, left, right)
        rate = 2 * size**3 / _fastest(product, device, remaining / 4)
        if rate > best_rate:
            best_size, best_rate = size, rate
    return best_size, best_rate


def _fastest(work: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Seconds of the fastest of at least three runs, after one that is not counted."""
    work()
    times: list[float] = []
    deadline = time.perf_counter() + seconds
    while len(times) < 3 or time.perf_counter() < deadline:
        synchronize(device)
        start = time.perf_counter()
        work()
        synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all it was given; nothing to wait for on a CPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
