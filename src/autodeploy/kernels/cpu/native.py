"""Native code: the C++ sources beside this file go in, callable functions come out, compiled once per machine.

The machine's own compiler builds for the machine's own processor; the result is kept in the cache directory. There are
no torch headers in it: kernels take raw pointers, sizes and strides through `ctypes`, which costs about a microsecond
per call where a registered operator written in Python costs several.

Threads are OpenMP's. The library is linked without an OpenMP runtime, so that its calls resolve to the one that torch
has loaded: a second runtime would compete with the first for the same cores. Where they do not resolve, the kernels are
compiled for one thread.
"""

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from autodeploy import env
from autodeploy.cache_dir import entry, fill
from autodeploy.errors import AutoDeployError, ConfigError

logger = logging.getLogger(__name__)

POINTER, INT64, FLOAT, INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float, ctypes.c_int
"""Argument types of native functions."""


class THREADS(ctypes.c_int):
    """The type of the argument that says how many threads a function starts; 0 where it runs in a team already."""


DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16"}
"""Dtypes that every kernel is compiled for, and what its name ends in."""

MIN_WEIGHTS_FOR_THREADS = 1 << 16
"""Weights of a product from which on a second thread pays."""

_SOURCES = Path(__file__).parent / "csrc"
_FLAGS = ("-O3", "-march=native", "-std=c++17", "-fPIC", "-fno-exceptions", "-fno-rtti", "-w")
_LIBRARY = "kernels.so"
_COMPILE_SECONDS = 300
_MATRIX_UNIT = (
    (logging.INFO, "no matrix unit (AMX) is used: the CPU kernels were compiled for a processor without one"),
    (
        logging.WARNING,
        "products of bfloat16 do without AMX, as the operating system refuses this process its registers",
    ),
    (logging.INFO, "products of bfloat16 use the processor's matrix unit (AMX)"),
)
"""What is logged for each result of `matrix_unit` in csrc/amx.cpp."""


class NativeError(AutoDeployError):
    """Native kernels could not be compiled or loaded; the message is the reason."""


_watching, _lookup = threading.Lock(), threading.Lock()
_watcher = 0
"""the thread whose calls are watched"""


class NativeFunction(dict[torch.dtype | None, Callable[..., Any]]):
    """A native function by dtype, None for one that takes any; the library is loaded when one is first asked for.

    Args:
        name: the C function's name without the dtype it ends in.
        arguments: its argument types.
        result: its result type, or None.
    """

    instances: ClassVar[list["NativeFunction"]] = []
    watch: ClassVar["Watch | None"] = None
    """given every call while `watching`"""

    def __init__(self, name: str, arguments: tuple[type[Any], ...], result: type[Any] | None = None):
        super().__init__()
        self._name, self._arguments, self._result = name, arguments, result
        self._loaded: dict[torch.dtype | None, NativeCall] = {}
        self.instances.append(self)

    def __missing__(self, dtype: torch.dtype | None) -> Callable[..., Any]:
        called = self._loaded.get(dtype)
        if called is None:
            called = self._loaded[dtype] = self._load(dtype)
        function = called.function
        with _lookup:
            watch = NativeFunction.watch
            if watch is None:
                self[dtype] = function
        if watch is None or threading.get_ident() != _watcher:
            return function

        return functools.partial(watch, called)

    def _load(self, dtype: torch.dtype | None) -> "NativeCall":
        symbol = self._name if dtype is None else f"{self._name}_{DTYPES[dtype]}"
        function: Any = getattr(library(), symbol)
        function.argtypes, function.restype = self._arguments, self._result
        repeats = getattr(library(), f"{symbol}_recorded", None)
        address = None if repeats is None else ctypes.cast(repeats, ctypes.c_void_p).value
        return NativeCall(symbol, self._arguments, function, address)


@dataclass(frozen=True)
class NativeCall:
    """What a watched call calls: the C function's name, its argument types, and itself.

    `recorded` is the address of the function that repeats the call from an array of arguments, None if there is none.
    """

    symbol: str
    arguments: tuple[type[Any], ...]
    function: Callable[..., Any]
    recorded: int | None


Watch = Callable[..., int | None]
"""Of a `NativeCall` and the arguments, in place of the call: makes it, or sees that it is made before anybody reads
what it computes, and returns its status.
"""


@contextlib.contextmanager
def watching(watch: Watch) -> Iterator[None]:
    """While this lasts, `watch` is given every native call of this thread."""
    global _watcher
    with _watching:
        with _lookup:  # nothing is remembered from here on, so that every call is looked up, and seen
            _watcher = threading.get_ident()
            NativeFunction.watch = staticmethod(watch)
            for function in NativeFunction.instances:
                function.clear()
        try:
            yield
        finally:
            NativeFunction.watch = None


def why_unavailable() -> str | None:
    """The reason that native kernels cannot be used here, or None. Compiles them on the first call on a machine."""
    if not env.is_native_enabled():
        return "native kernels are switched off by AUTODEPLOY_NATIVE=0"
    try:
        library()
    except NativeError as error:
        return str(error)
    return None


def why_refused(*tensors: Tensor | None) -> str | None:
    """The reason that native kernels cannot take these (fake) tensors together, or None."""
    given = [tensor for tensor in tensors if tensor is not None]
    for tensor in given:
        if tensor.dtype not in DTYPES:
            return f"dtype {tensor.dtype}; there are kernels for {', '.join(DTYPES.values())}"
        if tensor.dtype != given[0].dtype:
            return f"dtypes differ: {given[0].dtype} and {tensor.dtype}"
        if tensor.device.type != "cpu":
            return f"a tensor on {tensor.device}"
    return why_unavailable()


def is_compiled() -> bool:
    """True when asking for a kernel will not first compile the library."""
    if _loaded.cache_info().currsize or not env.is_native_enabled():
        return True
    compiler = _compiler()
    return compiler is None or any(_entry(compiler, threads=threads).is_dir() for threads in (True, False))


def pointer(tensor: Tensor | None) -> int | None:
    """Where a tensor's elements are; null for None."""
    return None if tensor is None else tensor.data_ptr()


def num_threads(work: int, least: int) -> int:
    """Threads for a kernel: torch's number when `work` is at least `least`, else one."""
    return torch.get_num_threads() if work >= least else 1


def build(folder: Path, compiler: str, *, threads: bool) -> Path:
    """Compile all sources into a library in `folder`, with the flags in AUTODEPLOY_NATIVE_FLAGS after our own.

    Raises:
        NativeError: with the end of what the compiler said.
    """
    flags = _flags()
    openmp = ("-fopenmp",) if threads else ()
    sources = sorted(_SOURCES.glob("*.cpp"))
    objects = [folder / f"{source.stem}.o" for source in sources]

    def compile_one(source: Path, target: Path) -> None:
        _run([compiler, *flags, *openmp, "-c", str(source), "-o", str(target)])

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        list(pool.map(compile_one, sources, objects))
    # Linked without -fopenmp: the runtime's symbols stay open, for torch's to fill.
    sanitizers = [flag for flag in flags if flag.startswith("-fsanitize")]
    _run([compiler, "-shared", *sanitizers, *map(str, objects), "-lm", "-o", str(folder / _LIBRARY)])
    for path in objects:
        path.unlink()
    return folder / _LIBRARY


def library() -> ctypes.CDLL:
    """The loaded library. Raises NativeError where there is none; a failure is remembered like a success."""
    outcome = _loaded()
    if isinstance(outcome, str):
        raise NativeError(outcome)
    return outcome


@functools.cache
def _loaded() -> ctypes.CDLL | str:
    """The library, or why there is none: asked for with every kernel, and compilers take their time to fail."""
    compiler = _compiler()
    if compiler is None:
        return "no C++ compiler was found (g++, c++ or clang++); install one, or name it in CXX"
    try:
        return _load(compiler, threads=True)
    except NativeError as error:
        return str(error)
    except OSError as error:
        logger.warning("native kernels run on one thread, as torch has loaded no OpenMP runtime for them: %s", error)
    try:
        return _load(compiler, threads=False)
    except NativeError as error:
        return str(error)
    except OSError as error:
        return f"the compiled kernels cannot be loaded: {error}"


def _load(compiler: str, *, threads: bool) -> ctypes.CDLL:
    """Raises NativeError when it cannot be compiled, OSError when it cannot be loaded."""
    try:
        return _opened(_built(compiler, threads=threads))
    except ConfigError as error:
        logger.warning("the CPU kernels are compiled for this process alone: %s", error)
    with tempfile.TemporaryDirectory(prefix="autodeploy-") as folder:
        return _opened(build(Path(folder), compiler, threads=threads))


def _opened(path: Path) -> ctypes.CDLL:
    opened = ctypes.CDLL(str(path))
    logger.log(*_MATRIX_UNIT[opened.matrix_unit()])
    return opened


def _built(compiler: str, *, threads: bool) -> Path:
    """The compiled library in the cache directory. Raises ConfigError where that takes nothing."""
    path = _entry(compiler, threads=threads)
    if not path.is_dir():
        logger.info("compiling the CPU kernels with %s; this takes seconds, once per machine", compiler)

    def write(folder: Path) -> None:
        build(folder, compiler, threads=threads)

    return fill(path, write) / _LIBRARY


def _compiler() -> str | None:
    for name in (env.preferred_compiler(), "g++", "c++", "clang++"):
        found = shutil.which(name) if name else None
        if found:
            return found
    return None


def _entry(compiler: str, *, threads: bool) -> Path:
    """Where the library for these sources, this compiler and this processor is kept."""
    content = hashlib.sha256()
    for source in sorted(_SOURCES.iterdir()):
        content.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    key = {"sources": content.hexdigest(), "flags": _flags(), "threads": threads}
    return entry("native", key | dict(_machine(compiler)))


def _flags() -> list[str]:
    return [*_FLAGS, *env.native_flags()]


@functools.cache
def _machine(compiler: str) -> Mapping[str, Any]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    described = [line for line in lines if line.startswith(("model name", "flags", "Features", "CPU part"))]
    return {
        "compiler": _run([compiler, "--version"]).splitlines()[0],
        "machine": platform.machine(),
        "processor": sorted(set(described)),
    }


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_COMPILE_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NativeError(f"the compiler {command[0]} could not be run: {error}") from error
    if done.returncode != 0:
        said = " ".join((done.stderr or done.stdout).split())[-300:]
        raise NativeError(f"the compiler {command[0]} failed: {said or f'exit status {done.returncode}'}")
    return done.stdout
