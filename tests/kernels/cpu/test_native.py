"""Compiling and loading: a reason whenever it cannot be, once per machine when it can, and torch's own threads."""

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from autodeploy.kernels.cpu import native
from autodeploy.kernels.cpu.linear import linear_cpu
from autodeploy.ops import linear


@pytest.fixture
def unloaded() -> Iterator[None]:
    """As if nothing had been loaded in this process, before and after."""
    native._loaded.cache_clear()
    native._machine.cache_clear()
    yield
    native._loaded.cache_clear()
    native._machine.cache_clear()


def supports() -> str | None:
    return linear.kernels["cpu"].supports(x=torch.ones(1, 4), weight=torch.ones(4, 4), bias=None)


@pytest.mark.usefixtures("unloaded")
def test_without_a_compiler_the_reason_says_so(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    assert "no C++ compiler was found" in (supports() or "")
    assert native.is_compiled()  # nothing would be compiled


@pytest.mark.usefixtures("unloaded")
def test_a_compiler_that_fails_is_quoted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = tmp_path / "broken-c++"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && echo broken 1.0 && exit\necho out of ideas >&2\nexit 3\n')
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    assert not native.is_compiled()
    assert "broken-c++ failed: out of ideas" in (supports() or "")


@pytest.mark.usefixtures("unloaded")
def test_a_failure_is_remembered(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every kernel of a model asks; a compiler that fails is not asked again for each."""
    monkeypatch.setenv("AUTODEPLOY_CACHE", str(tmp_path))
    tries: list[Path] = []

    def fail(folder: Path, compiler: str, *, threads: bool) -> Path:
        tries.append(folder)
        raise native.NativeError("out of ideas")

    monkeypatch.setattr(native, "build", fail)
    assert [supports() for _ in range(3)] == ["out of ideas"] * 3 and len(tries) == 1


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize("fault", ["blocked", "full"])
def test_without_a_cache_directory_they_are_compiled_for_this_process(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    compiler = native._compiler()
    assert compiler is not None
    compiled = native._built(compiler, threads=True)
    places: list[Path] = []

    def build(folder: Path, compiler: str, *, threads: bool) -> Path:
        places.append(folder)
        if tmp_path in folder.parents:
            raise native.NativeError("ld: cannot write: No space left on device")
        return Path(shutil.copy(compiled, folder))

    monkeypatch.setattr(native, "build", build)
    blocked = tmp_path / "file"
    blocked.touch()
    monkeypatch.setenv("AUTODEPLOY_CACHE", str(blocked / "cache" if fault == "blocked" else tmp_path))
    assert supports() is None
    assert torch.equal(linear_cpu(torch.ones(1, 4), torch.ones(4, 4), None), torch.full((1, 4), 4.0))
    assert "for this process alone" in caplog.text
    assert ("cannot be written" if fault == "blocked" else "is full") in caplog.text
    assert not places[-1].exists(), "nothing is left behind"


@pytest.mark.usefixtures("unloaded")
def test_a_damaged_library_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("AUTODEPLOY_CACHE", str(tmp_path))
    compiler = native._compiler()
    assert compiler is not None
    for threads in (True, False):
        folder = native._entry(compiler, threads=threads)
        folder.mkdir(parents=True)
        (folder / "kernels.so").write_bytes(b"not a library")
    assert "cannot be loaded" in (supports() or "")


def test_switched_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AUTODEPLOY_NATIVE", "0")
    assert "AUTODEPLOY_NATIVE=0" in (supports() or "")


def test_compiled_once_and_for_these_sources(monkeypatch: pytest.MonkeyPatch) -> None:
    assert supports() is None
    assert native.is_compiled()
    monkeypatch.setattr(native, "build", lambda *_, **__: pytest.fail("compiled again"))
    native._loaded.cache_clear()
    assert supports() is None
    monkeypatch.setenv("AUTODEPLOY_NATIVE_FLAGS", "-DOTHER")
    assert native.is_compiled(), "what is loaded stays in use"
    native._loaded.cache_clear()
    assert not native.is_compiled()


def test_one_openmp_runtime_for_torch_and_the_kernels() -> None:
    """In a process of its own, where no other test has loaded anything."""
    script = (
        "import torch; from autodeploy.kernels.cpu import native\n"
        "assert native.why_unavailable() is None\n"
        "from autodeploy.kernels.cpu.linear import linear_cpu\n"
        "linear_cpu(torch.ones(1, 512), torch.ones(512, 512), None)\n"
        "paths = {line.split()[-1] for line in open('/proc/self/maps') if '/' in line}\n"
        "print(sum('kernels.so' in p for p in paths), sum('omp' in p.rsplit('/')[-1] for p in paths))\n"
    )
    found = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, env={**os.environ, **_path()}
    )
    assert found.stdout.split() == ["1", "1"]
    assert "one thread" not in found.stderr


def _path() -> dict[str, str]:
    return {"PYTHONPATH": str(Path(native.__file__).parents[3])}


@pytest.mark.usefixtures("unloaded")
def test_without_openmp_one_thread_computes_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = torch.randn(3, 512), torch.randn(512, 512)
    threaded = linear_cpu(x, weight, None)
    built = native._built

    def no_openmp(compiler: str, *, threads: bool) -> Path:
        if threads:
            return Path("/nonexistent/kernels.so")
        return built(compiler, threads=threads)

    monkeypatch.setattr(native, "_built", no_openmp)
    function = native.NativeFunction("linear", (*[native.POINTER] * 4, *[native.INT64] * 3, native.POINTER, native.INT))
    out = torch.empty(3, 512)
    function[torch.float32](x.data_ptr(), weight.data_ptr(), None, out.data_ptr(), 3, 512, 512, None, 2)
    assert torch.equal(out, threaded)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_results_do_not_depend_on_the_number_of_threads(threads: int) -> None:
    x, weight = torch.randn(3, 300), torch.randn(501, 300)
    expected = linear_cpu(x, weight, None)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        assert torch.equal(linear_cpu(x, weight, None), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("tensors", "reason"),
    [
        ((torch.ones(1), torch.ones(1, dtype=torch.bfloat16)), "dtypes differ"),
        ((torch.ones(1, device="meta"),), "a tensor on meta"),
        ((torch.ones(1, dtype=torch.int8),), "dtype torch.int8"),
    ],
)
def test_refused_tensors(tensors: tuple[Tensor, ...], reason: str) -> None:
    assert reason in (native.why_refused(*tensors) or "")
