"""The machine's limits: plausible, repeatable within a factor, and quick."""

import time

import numpy as np
import pytest
import torch

from autodeploy.bench.machine import measure


def test_rates_agree_with_another_library() -> None:
    start = time.perf_counter()
    limits = measure(torch.device("cpu"), torch.float32, seconds=0.6)
    assert time.perf_counter() - start < 8
    left = np.ones((1024, 1024), dtype=np.float32)
    buffer = np.ones(2**24, dtype=np.float64)
    product = _fastest(lambda: left @ left)
    read = _fastest(buffer.sum)
    # numpy may use other kernels and threads: the same order of magnitude is what a shared machine lets one say.
    assert 0.1 < limits.matmul_gflop_per_second / (2 * 1024**3 / product / 1e9) < 30
    assert 0.2 < limits.memory_gb_per_second / (buffer.nbytes / read / 1e9) < 30
    assert limits.threads == torch.get_num_threads()
    assert (limits.device, limits.dtype) == ("cpu", "float32")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_dtype_of_a_model_can_be_measured(dtype: torch.dtype) -> None:
    limits = measure(torch.device("cpu"), dtype, seconds=0.2)
    assert limits.matmul_gflop_per_second > 0.1
    assert limits.matmul_size >= 512


@pytest.mark.gpu
def test_a_gpu_reads_faster_than_a_hundred_gigabytes_per_second() -> None:
    limits = measure(torch.device("cuda"), torch.bfloat16, seconds=0.5)
    assert limits.device == "cuda"
    assert limits.memory_gb_per_second > 100
    assert limits.matmul_gflop_per_second > 1000


def _fastest(work: object) -> float:
    assert callable(work)
    times = []
    for _ in range(5):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)
