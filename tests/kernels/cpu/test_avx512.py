"""What is compiled for AVX-512, on any x86-64 processor with AVX2: all kernels, with its instructions emulated."""

import ctypes
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from autodeploy.kernels.cpu import native

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
EMULATED = ["-mno-avx512f", "-include", str(HERE / "emulated_avx512.h")]
BUILDS = {
    "f": (1, []),
    "f_bw": (3, ["-DEMULATE_BW"]),
    "f_bw_vnni": (7, ["-DEMULATE_BW", "-DEMULATE_VNNI"]),
    "f_bw_vnni_bf16": (15, ["-DEMULATE_BW", "-DEMULATE_VNNI", "-DEMULATE_BF16"]),
}
"""The features that a library says it was compiled for, and what is added to EMULATED."""
REAL = ["-mavx512bw", "-mavx512vnni", "-mavx512bf16"]

CPUINFO = Path("/proc/cpuinfo")
FEATURES = set(CPUINFO.read_text().split()) if CPUINFO.exists() else set()
pytestmark = pytest.mark.skipif("avx2" not in FEATURES, reason="this processor has no AVX2")

Array = np.ndarray


def kernels_as_tested_with(flags: list[str], folder: Path) -> list[ctypes.CDLL]:
    """The libraries, compiled with these flags, that all tests of CPU kernels passed with in processes of their own."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("PYTEST")},
        "OMP_NUM_THREADS": "1",
        "AUTODEPLOY_CACHE": str(folder / "cache"),  # in use while tests are collected, before they have their own
        # Less optimised than they are used: compiling takes as long as running.
        "AUTODEPLOY_NATIVE_FLAGS": shlex.join(["-O1", *flags]),
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--basetemp", str(folder / "tests")]
    processes = ["--numprocesses", "logical", "--maxprocesses", "4", "--dist", "loadfile"]
    selection = [
        "tests/kernels/cpu",
        "tests/kernels/test_every_kernel.py",
        "-k",
        "cpu and not test_native and not test_avx512 and not test_amx",
    ]
    done = subprocess.run(
        [*command, *processes, *selection], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-2000:]
    return [ctypes.CDLL(str(path)) for path in folder.rglob("kernels.so")]


@pytest.mark.slow
@pytest.mark.parametrize("build", BUILDS)
def test_all_kernels(build: str, tmp_path: Path) -> None:
    features, flags = BUILDS[build]
    libraries = kernels_as_tested_with([*EMULATED, *flags], tmp_path)
    assert libraries and all(library.emulated_avx512_features() == features for library in libraries)


@pytest.fixture(scope="module", params=["emulated", "real"])
def instructions(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The instructions, emulated and, where this processor has them, as they are."""
    if request.param == "real" and not {"avx512bw", "avx512_vnni", "avx512_bf16"} <= FEATURES:
        pytest.skip("this processor lacks some of the instructions")
    compiler = native._compiler()
    assert compiler is not None
    flags = [*EMULATED, *BUILDS["f_bw_vnni_bf16"][1]] if request.param == "emulated" else REAL
    library = tmp_path_factory.mktemp("instructions") / "instructions.so"
    source = HERE / "avx512_instructions.cpp"
    command = [compiler, "-O1", "-march=native", "-std=c++17", "-fPIC", "-shared", "-w", *flags, str(source)]
    subprocess.run([*command, "-o", str(library)], check=True, capture_output=True)
    return ctypes.CDLL(str(library))


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(0)


def call(function: Callable[..., object], *arrays: Array, out: Array) -> Array:
    function(*[array.ctypes.data_as(ctypes.c_void_p) for array in (*arrays, out)])
    return out


def floats(rng: np.random.Generator, *, scale: float = 100.0) -> Array:
    return (rng.standard_normal(16) * scale).astype(np.float32)


def same_bits(found: Array, expected: Array) -> bool:
    return bool(np.array_equal(found.view(np.uint32), expected.view(np.uint32)))


def test_sums_and_maxima_of_floats(instructions: ctypes.CDLL, rng: np.random.Generator) -> None:
    for _ in range(50):
        x = floats(rng)
        eight = x[:8] + x[8:]
        four = eight[:4] + eight[4:]
        two = four[:2] + four[2:]
        one = np.empty(1, np.float32)
        assert call(instructions.reduce_add_ps, x, out=one)[0] == two[0] + two[1]
        assert call(instructions.reduce_max_ps, x, out=one)[0] == x.max()


def test_sums_and_maxima_of_whole_numbers(instructions: ctypes.CDLL, rng: np.random.Generator) -> None:
    for _ in range(50):
        x = rng.integers(-(2**31), 2**31, 16, dtype=np.int64).astype(np.int32)
        one = np.empty(1, np.int32)
        assert call(instructions.reduce_add_epi32, x, out=one)[0] == x.sum(dtype=np.int32)
        assert call(instructions.reduce_max_epi32, x, out=one)[0] == x.max()


def test_rounding(instructions: ctypes.CDLL, rng: np.random.Generator) -> None:
    special = [0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 0.49999997, 2.0**31, -(2.0**31), -3e9, 2147483520.0, 1e-40]
    x = np.array([*special, np.inf, -np.inf, np.nan, 3.0], np.float32)
    expected = [0, 2, 2, 0, -2, -2, 0, -(2**31), -(2**31), -(2**31), 2147483520, 0, *[-(2**31)] * 3, 3]
    assert call(instructions.cvtps_epi32, x, out=np.empty(16, np.int32)).tolist() == expected
    for _ in range(50):
        x = floats(rng)
        assert (call(instructions.cvtps_epi32, x, out=np.empty(16, np.int32)) == np.rint(x)).all()


def test_every_float16(instructions: ctypes.CDLL) -> None:
    for first in range(0, 2**16, 16):
        halves = np.arange(first, first + 16).astype(np.uint16)
        expected = halves.view(np.float16).astype(np.float32)
        expected.view(np.uint32)[np.isnan(expected)] |= 0x400000  # the instruction leaves no signalling NaN
        assert same_bits(call(instructions.cvtph_ps, halves, out=np.empty(16, np.float32)), expected)


def test_moves(instructions: ctypes.CDLL, rng: np.random.Generator) -> None:
    x = rng.integers(0, 2**32, 16, dtype=np.uint64).astype(np.uint32)
    assert (call(instructions.cvtepi32_epi16, x, out=np.empty(16, np.uint16)) == x.astype(np.uint16)).all()
    assert (call(instructions.halves, x, out=np.empty(16, np.uint32)) == x).all()
    words = x.view(np.uint16)[:16].copy()
    assert (call(instructions.cvtepu16_epi32, words, out=np.empty(16, np.uint32)) == words).all()
    for dtype, function in [(np.int32, "set1_epi32"), (np.int16, "set1_epi16"), (np.int8, "set1_epi8")]:
        one = np.array([-7], dtype)
        out = call(getattr(instructions, function), one, out=np.empty(64 // one.itemsize, dtype))
        assert (out == -7).all()


def test_whole_numbers(instructions: ctypes.CDLL, rng: np.random.Generator) -> None:
    for _ in range(50):
        a, b = (rng.integers(0, 2**32, 16, dtype=np.uint64).astype(np.uint32) for _ in range(2))
        assert (call(instructions.add_epi32, a, b, out=np.empty(16, np.uint32)) == a + b).all()
        words = [x.view(np.uint16) for x in (a, b)]
        assert (call(instructions.add_epi16, a, b, out=np.empty(32, np.uint16)) == words[0] + words[1]).all()
        assert (call(instructions.srli_epi16, a, out=np.empty(32, np.uint16)) == words[0] >> 4).all()


def test_products_of_bytes(instructions: ctypes.CDLL, rng: np.random.Generator) -> None:
    extremes = np.full(64, 255, np.uint8), np.full(64, -128, np.int8)
    for i in range(50):
        total = rng.integers(-(2**31), 2**31, 16, dtype=np.int64).astype(np.int32)
        random = rng.integers(0, 256, 64, dtype=np.uint8), rng.integers(-128, 128, 64, dtype=np.int8)
        a, b = random if i else extremes
        products = (a.astype(np.int32) * b).reshape(16, 4).sum(1, dtype=np.int32)
        assert (call(instructions.dpbusd, total, a, b, out=np.empty(16, np.int32)) == total + products).all()


def test_sums_of_pairs(instructions: ctypes.CDLL, rng: np.random.Generator) -> None:
    lowest, highest = np.full(64, -128, np.int8), np.full(64, 255, np.uint8)
    for i in range(50):
        words = [rng.integers(-(2**15), 2**15, 32, dtype=np.int16) for _ in range(2)]
        expected = np.prod(words, axis=0, dtype=np.int64).reshape(16, 2).sum(1).astype(np.int32)
        assert (call(instructions.madd_epi16, *words, out=np.empty(16, np.int32)) == expected).all()
        random = rng.integers(0, 256, 64, dtype=np.uint8), rng.integers(-128, 128, 64, dtype=np.int8)
        a, b = random if i else (highest, lowest)
        sums = (a.astype(np.int32) * b).reshape(32, 2).sum(1).clip(-(2**15), 2**15 - 1)
        assert (call(instructions.maddubs_epi16, a, b, out=np.empty(32, np.int16)) == sums).all()


def test_products_of_bfloat16(instructions: ctypes.CDLL, rng: np.random.Generator) -> None:
    """In float64 a product of two is exact; so is the sum, unless exponents differ by more than a fraction has bits."""
    for _ in range(50):
        total = floats(rng, scale=4.0)
        a, b = (np.concatenate([floats(rng, scale=4.0), floats(rng, scale=4.0)]) for _ in range(2))
        for array in (a, b):
            array.view(np.uint32)[:] &= 0xFFFF0000
        products = a.astype(np.float64) * b
        expected = (total + products[1::2]).astype(np.float32)
        expected = (expected + products[::2]).astype(np.float32)
        pairs = [(array.view(np.uint32) >> 16).astype(np.uint16) for array in (a, b)]
        assert same_bits(call(instructions.dpbf16, total, *pairs, out=np.empty(16, np.float32)), expected)


def test_products_of_bfloat16_have_no_denormals(instructions: ctypes.CDLL) -> None:
    """Neither as arguments, nor as what is added to, nor as results."""
    total, a, b = np.zeros(16, np.float32), np.zeros(32, np.uint16), np.zeros(32, np.uint16)
    one, smallest, large = 0x3F80, 0x0080, 0x7000  # 1, 2^-126, 2^97
    total[0], a[0], b[0] = 2.0**-127, one, one  # a denormal total
    a[2], b[2] = 0x0040, large  # a denormal argument
    a[4], b[4] = smallest, 0x3F00  # half the smallest normal number
    total[3], a[6], b[6] = 2.0**-126, smallest, one  # twice the smallest
    a[9], b[9], a[8], b[8] = smallest, 0x3F00, smallest, 0x3F00  # two halves of it, each flushed by itself
    expected = np.zeros(16, np.float32)
    expected[0], expected[3] = 1.0, 2.0**-125
    assert same_bits(call(instructions.dpbf16, total, a, b, out=np.empty(16, np.float32)), expected)


def test_the_second_of_a_pair_is_added_first(instructions: ctypes.CDLL) -> None:
    total, a, b = np.zeros(16, np.float32), np.zeros(32, np.uint16), np.zeros(32, np.uint16)
    total[0] = 2.0**24
    a[1], b[1], a[0], b[0] = 0xCB80, 0x3F80, 0x3F80, 0x3F80  # - 2^24, then + 1; the other way, 1 would be lost
    assert call(instructions.dpbf16, total, a, b, out=np.empty(16, np.float32))[0] == 1.0


@pytest.mark.slow
@pytest.mark.parametrize("processor", ["skylake-avx512", "icelake-server", "cooperlake", "sapphirerapids"])
def test_compiles_for_the_real_ones(processor: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The emulation stands in for intrinsics and assembly, whose own types and constraints are seen here."""
    compiler = native._compiler()
    assert compiler is not None
    empty = [compiler, f"-march={processor}", "-E", "-x", "c++", os.devnull]
    if subprocess.run(empty, capture_output=True, check=False).returncode != 0:
        pytest.skip(f"{compiler} does not know this processor")
    monkeypatch.setenv("AUTODEPLOY_NATIVE_FLAGS", f"-O1 -march={processor}")
    assert native.build(tmp_path, compiler, threads=True).is_file()
