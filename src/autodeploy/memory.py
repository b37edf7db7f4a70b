"""Memory: how much a device can still give, for what refuses before it allocates, and large blocks of it."""

import ctypes
from pathlib import Path

import numpy as np
import psutil
import torch
from torch import Tensor

_MADV_DONTNEED = 4
_MADV_HUGEPAGE = 14
_MADV_NOHUGEPAGE = 15
_PAGE_BYTES = 4096
_HUGE_PAGE_BYTES = 2**21


def available_bytes(device: torch.device) -> int:
    """Memory that can still be allocated on `device`, in bytes; on the CPU within the limit of a container."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min([int(psutil.virtual_memory().available), *container_bytes(Path("/sys/fs/cgroup"))])


def container_bytes(root: Path) -> list[int]:
    """What the control group under `root` still allows, as one number; empty when it sets no limit.

    psutil reports the host's memory, which a container may be refused long before it is used up. Caches that the kernel
    can drop count as free.
    """
    for limit_name, usage_name, cache_name in (
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ):
        limit_file = root / limit_name
        try:
            limit = int(limit_file.read_text())  # "max" when there is no limit
            usage = int((root / usage_name).read_text())
            stat = dict(line.split() for line in (limit_file.parent / "memory.stat").read_text().splitlines())
            return [max(0, limit - usage + int(stat[cache_name]))]
        except (OSError, ValueError, KeyError):
            continue
    return []


def huge_pages(num_bytes: int) -> Tensor:
    """An uninitialised uint8 tensor on the CPU whose memory the system is asked to back with huge pages.

    Where the system has none, or does not know the request, it is ordinary memory.
    """
    block = torch.empty(num_bytes, dtype=torch.uint8)
    _advise(block.data_ptr(), block.data_ptr() + num_bytes, _MADV_HUGEPAGE)
    return block


def zeros_when_touched(num_bytes: int) -> Tensor:
    """A uint8 tensor of zeros on the CPU whose memory the system hands out when it is first touched.

    It comes in huge pages, but for the beginning: of many tensors that are filled from their beginnings, each would
    take a huge page for its first bytes.

    Raises:
        MemoryError, ValueError: there is no such memory, or no room in the address space for it.
    """
    block = torch.from_numpy(np.zeros(num_bytes, dtype=np.uint8))
    begin, end = block.data_ptr(), block.data_ptr() + num_bytes
    border = min(begin + _HUGE_PAGE_BYTES, end)
    _advise(border, end, _MADV_HUGEPAGE)
    _advise(begin, border, _MADV_NOHUGEPAGE)  # NumPy asks for huge pages throughout
    return block


def forget_pages(address: int, path: Path) -> None:
    """Give back the memory of the mapping around an address, if it is one of the file, which is read again when needed.

    For mappings that nobody has written to: what was written to a private one is lost.
    """
    maps = Path("/proc/self/maps")
    for line in maps.read_text(encoding="utf-8").splitlines() if maps.exists() else ():
        addresses, _, rest = line.partition(" ")
        first, end = (int(border, 16) for border in addresses.split("-"))
        if first <= address < end and rest.endswith(f" {path.resolve()}"):
            _advise(first, end, _MADV_DONTNEED)


def _advise(begin: int, end: int, advice: int) -> None:
    """Tell the system what becomes of the whole pages between two addresses, where it can be told."""
    begin = -(-begin // _PAGE_BYTES) * _PAGE_BYTES
    length = end // _PAGE_BYTES * _PAGE_BYTES - begin
    madvise = getattr(ctypes.CDLL(None), "madvise", None)
    if madvise is not None and length > 0:
        madvise(ctypes.c_void_p(begin), ctypes.c_size_t(length), advice)
