"""Compiles every launch of every Triton kernel for CUDA devices that are not there; prints what each takes, as JSON.

    python -m tests.kernels.triton.compiled [--every] CAPABILITY...
    python -m tests.kernels.triton.compiled --variants

The second form compiles nothing; it prints how often each kernel would be compiled in steps of different sizes.

Run as a process of its own, without Triton's interpreter: what is declared for one cannot go to the other. Kernels are
called with the arguments in `sizes.py`, which have no data: one that waited for a value on the device would fail here,
as it would while a CUDA graph is captured.
"""

import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget

from autodeploy.kernels import triton as provider
from autodeploy.kernels.triton import launch as launching
from autodeploy.kernels.triton.launch import Launch, written_down
from autodeploy.ops import OPS
from autodeploy.ops.attention import is_float8
from tests.kernels.triton.sizes import MORE, SIZES, STEPS, Arguments

_FLOAT8_CAPABILITY = 89
_NEWEST = 90
_PROCESSORS = 132
"""of the device that launches are made for, an H200"""
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


def launches(name: str, samples: Iterable[Arguments]) -> list[Launch]:
    """What an op's kernel launches for some arguments."""
    with written_down() as found:
        for arguments in samples:
            OPS[name].kernels[provider.PROVIDER].function(**arguments)
    return found


def variant(launch: Launch) -> tuple[Any, ...]:
    """What Triton compiles a kernel anew for: constants, dtypes, and whether whole numbers are 1 or multiples of 16."""
    function = launch.kernel.function
    named = dict(zip(function.arg_names, launch.arguments, strict=False))
    named |= launch.kernel.options(launch.kernel.configurations[0], launch.values)

    def seen(parameter: Any) -> Any:
        value = named[parameter.name]
        if parameter.is_constexpr or value is None:
            return value
        if isinstance(value, Tensor):
            return value.dtype
        if isinstance(value, float) or parameter.do_not_specialize:
            return type(value)
        return 1 if value == 1 else value % 16 == 0

    return tuple(map(seen, function.params))


def num_variants(name: str) -> dict[str, int]:
    """How often each kernel that an op launches is compiled in the steps of `STEPS`."""
    found: dict[str, set[tuple[Any, ...]]] = {}
    for launch in launches(name, STEPS[name]()):
        found.setdefault(launch.kernel.function.__name__, set()).add(variant(launch))
    return {function: len(variants) for function, variants in found.items()}


def driver(capability: int) -> Any:
    """Stands in for the driver of a device. Triton keeps compiled kernels by device, so each capability is one."""
    return SimpleNamespace(
        get_current_device=lambda: capability,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", capability, 32),
    )


def resources(launch: Launch, configuration: Any, capability: int) -> dict[str, Any]:
    """Compile for the device that the driver stands for: bytes of shared memory, registers, bytes of local memory."""
    values = launch.kernel.options(configuration, launch.values)
    kernel = launch.kernel.function.warmup(*launch.arguments, grid=(1,), **values)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run([_CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True)
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", usage.stdout))
    return {
        "function": launch.kernel.function.__name__,
        "configuration": str({k: v for k, v in values.items() if isinstance(v, int)}),
        "capability": capability,
        "shared_bytes": kernel.metadata.shared,
        "registers": int(found["REG"]),
        "local_bytes": int(found["STACK"]) + int(found["LOCAL"]),
    }


def has_float8(launch: Launch) -> bool:
    """Whether some of its numbers are float8, which devices before 8.9 do not convert."""
    tensors = [argument for argument in launch.arguments if isinstance(argument, Tensor)]
    return any(is_float8(tensor.dtype) for tensor in tensors)


def compiled(name: str, capabilities: Iterable[int], every: bool) -> Iterator[dict[str, Any]]:
    """The first configuration, or every one, of each launch for each capability that has what it needs."""
    for capability in capabilities:
        triton.runtime.driver.set_active(driver(capability))
        tables = [SIZES, MORE] if every and capability == _NEWEST else [SIZES]
        for table, launch in ((t, launch) for t in tables if name in t for launch in launches(name, t[name]())):
            if has_float8(launch) and capability < _FLOAT8_CAPABILITY:
                continue
            for configuration in launch.kernel.configurations if every else launch.kernel.configurations[:1]:
                yield resources(launch, configuration, capability) | {"is_usual": table is SIZES}


if __name__ == "__main__":
    for module in provider.MODULES:
        importlib.import_module(f"{provider.__name__}.{module}")
    launching._PROCESSORS_WITHOUT_DEVICE = _PROCESSORS
    if sys.argv[1:] == ["--variants"]:
        print(json.dumps({name: num_variants(name) for name in STEPS}))
    else:
        names = [name for name, op in OPS.items() if provider.PROVIDER in op.kernels]
        every, wanted = "--every" in sys.argv, [int(argument) for argument in sys.argv[1:] if argument != "--every"]
        print(json.dumps({name: list(compiled(name, wanted, every)) for name in names}))
