"""Available memory: positive, plausible, and within a container's limit."""

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
