"""Available memory: positive, plausible, and within a container's limit."""

import platform
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import torch

from autodeploy.memory import available_bytes, container_bytes, forget_pages, huge_pages, zeros_when_touched


def test_available_memory_is_plausible() -> None:
    assert 0 < available_bytes(torch.device("cpu")) < 2**50


@pytest.mark.parametrize("layout", ["v2", "v1"])
def test_the_limit_of_a_container_counts(tmp_path: Path, layout: str) -> None:
    assert container_bytes(tmp_path) == []
    folder = tmp_path if layout == "v2" else tmp_path / "memory"
    folder.mkdir(exist_ok=True)
    limit, usage, cache = {
        "v2": ("memory.max", "memory.current", "inactive_file"),
        "v1": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    }[layout]
    (folder / limit).write_text("1000\n")
    (folder / usage).write_text("700\n")
    (folder / "memory.stat").write_text(f"anon 500\n{cache} 150\nactive_file 7\n")
    assert container_bytes(tmp_path) == [450]
    (folder / limit).write_text("600\n")
    assert container_bytes(tmp_path) == [50]
    (folder / limit).write_text("max\n")
    assert container_bytes(tmp_path) == []


REUSE = """
import ctypes, resource
from autodeploy.memory import reuse_freed_memory

assert reuse_freed_memory()
library = ctypes.CDLL(None)
library.malloc.restype = ctypes.c_void_p
for round in range(6):
    if round == 2:
        begin = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    blocks = [library.malloc(ctypes.c_size_t(20 << 20)) for _ in range(2)]
    for block in blocks:
        ctypes.memset(block, 1, 20 << 20)
    for block in blocks:
        library.free(ctypes.c_void_p(block))
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - begin)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have other thresholds")
def test_freed_memory_is_reused() -> None:
    """Two blocks of 20 MiB are 10,240 pages, which glibc by itself gives back each time."""
    done = subprocess.run([sys.executable, "-c", REUSE], capture_output=True, text=True, timeout=600, check=True)
    assert int(done.stdout) < 1000


def test_huge_pages_are_memory_like_any_other() -> None:
    for num_bytes in (0, 1, 4095, 5_000_001):
        block = huge_pages(num_bytes)
        assert block.shape == (num_bytes,) and block.dtype == torch.uint8
        assert bool((block.fill_(7) == 7).all())


def test_zeros_take_memory_for_what_is_touched() -> None:
    for num_bytes in (0, 1, 5_000_001):
        block = zeros_when_touched(num_bytes)
        assert block.shape == (num_bytes,) and not block.any()
        assert bool((block.fill_(7) == 7).all())
    blocks = [zeros_when_touched(8 * 2**20) for _ in range(64)]
    before = psutil.Process().memory_info().rss
    for block in blocks:
        block[: 2**21 : 2**18] = 1
    assert psutil.Process().memory_info().rss - before < 64 * 2**19


def test_only_mappings_of_the_named_file_are_forgotten(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(range(256)) * 64)
    mapped = torch.from_file(str(tmp_path / "file"), size=256 * 64, dtype=torch.uint8)
    memory = torch.full((256 * 64,), 7, dtype=torch.uint8)
    for tensor in (mapped, memory):
        tensor[-1] = 9  # a change of our own is lost with its page
        forget_pages(tensor.data_ptr(), tmp_path / "other")
        assert tensor[-1] == 9
        forget_pages(tensor.data_ptr(), tmp_path / "file")
    assert memory[-1] == 9 and mapped[-1] == 255
