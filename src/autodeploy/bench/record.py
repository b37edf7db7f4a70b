"""A benchmark's record: results in; JSON with versions, machine, options and raw samples out.

A number without the conditions it was taken under cannot be compared with another one, so they are stored together.
"""

import dataclasses
import json
import os
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from autodeploy.bench.machine import MachineLimits
from autodeploy.compile.program import Program
from autodeploy.config import Options

SCHEMA = 1
_PACKAGES = ("autodeploy", "torch", "transformers", "triton", "numpy")


def write(
    path: Path,
    *,
    benchmark: str,
    arguments: Mapping[str, Any],
    options: Options,
    program: Program,
    limits: MachineLimits,
    results: Mapping[str, Any],
    samples: Mapping[str, Any],
) -> None:
    """Write one benchmark as JSON to `path`, making its folder."""
    record = {
        "schema": SCHEMA,
        "benchmark": benchmark,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "arguments": arguments,
        "results": results,
        "limits": dataclasses.asdict(limits),
        "options": dataclasses.asdict(options),
        "build": {"facts": program.report.facts, "seconds": program.report.seconds, "kernels": program.report.kernels},
        "versions": versions(),
        "machine": machine(),
        "samples": samples,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2, default=str) + "\n", encoding="utf-8")


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide speed; those not installed are left out."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine() -> dict[str, Any]:
    """The processor, its cores and memory, the load it was under, and the CUDA device if there is one."""
    facts: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": psutil.cpu_count(logical=False),
        "threads": psutil.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "memory_bytes": psutil.virtual_memory().total,
        "load_average": os.getloadavg(),
    }
    if torch.cuda.is_available():
        facts["cuda_device"] = torch.cuda.get_device_name()
    return facts


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
