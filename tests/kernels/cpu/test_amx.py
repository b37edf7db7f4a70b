"""Products on tiles (AMX), emulated and, where the processor has them, real: exact, within their memory, or refused."""

import ctypes
import logging
import subprocess
from pathlib import Path

import numpy as np
import pytest

from autodeploy.kernels.cpu import native
from tests.kernels.cpu.test_avx512 import BUILDS, EMULATED, FEATURES, HERE, kernels_as_tested_with

EMULATED_AMX = [*EMULATED, *BUILDS["f_bw_vnni_bf16"][1], "-include", str(HERE / "emulated_amx.h")]
REFUSED = [*EMULATED_AMX, "-DEMULATED_AMX_REFUSED"]
REAL = ["-mavx512bw", "-mavx512bf16", "-mamx-tile", "-mamx-bf16"]
HAS_AMX = {"amx_bf16", "avx512_bf16"} <= FEATURES
SIZES = [1, 2, 15, 16, 17, 31, 32, 33, 64, 65, 79]

pytestmark = pytest.mark.skipif("avx2" not in FEATURES, reason="this processor has no AVX2")

Array = np.ndarray


def compiled(source: Path, flags: list[str], folder: Path) -> Path:
    compiler = native._compiler()
    assert compiler is not None
    library = folder / "library.so"
    command = [compiler, "-O1", "-march=native", "-std=c++17", "-fPIC", "-shared", "-w", *flags, f"-I{native._SOURCES}"]
    done = subprocess.run([*command, str(source), "-o", str(library)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return library


@pytest.fixture(scope="module", params=[EMULATED_AMX, REAL] if HAS_AMX else [EMULATED_AMX], ids=len)
def products(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = compiled(HERE / "amx_products.cpp", request.param, tmp_path_factory.mktemp("products"))
    return ctypes.CDLL(str(library))


def bfloat16(x: Array) -> Array:
    return (x.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)


def whole_numbers(rng: np.random.Generator, *shape: int) -> Array:
    """Small enough that every sum of their products is exact, in whatever order."""
    return rng.integers(-8, 9, shape).astype(np.float32)


def pairs_of(matrix: Array) -> Array:
    """A matrix `[depth, columns]` as `[depth / 2, columns, 2]`, rounded up."""
    even = np.pad(matrix, ((0, matrix.shape[0] % 2), (0, 0)))
    return np.ascontiguousarray(even.reshape(-1, 2, matrix.shape[1]).transpose(0, 2, 1))


def surrounded(array: Array, margin: int = 4096) -> tuple[Array, Array]:
    """The array in memory where NaN of both formats stands around it, and all of that memory."""
    room = np.full(array.nbytes + 2 * margin, 0xFF, np.uint8)
    inside = room[margin : margin + array.nbytes].view(array.dtype).reshape(array.shape)
    inside[:] = array
    return inside, room


def at(array: Array) -> ctypes.c_void_p:
    return array.ctypes.data_as(ctypes.c_void_p)


def test_the_instruction(products: ctypes.CDLL) -> None:
    """Even and odd inputs are summed by themselves from zero, in their order, and then added to what was there."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        a, b = (bfloat16(rng.standard_normal((16, 32)) * 4) for _ in range(2))
        sums = rng.standard_normal((16, 16)).astype(np.float32) * 16
        left, right = ((x.astype(np.uint32) << 16).view(np.float32).reshape(16, 16, 2) for x in (a, b))
        parts = np.zeros((16, 16, 2), np.float32)
        for k in range(16):  # in float64 a product is exact, and so is its sum with a float32 of a like size
            exact = left[:, None, k].astype(np.float64) * right[k].astype(np.float64)
            parts = (parts + exact).astype(np.float32)
        expected = sums + (parts[..., 0] + parts[..., 1])
        products.add_products(at(a), at(b), at(sums))
        assert np.array_equal(sums, expected)


def test_the_instruction_knows_no_denormals(products: ctypes.CDLL) -> None:
    a, b, sums = np.zeros((16, 32), np.uint16), np.zeros((16, 32), np.uint16), np.zeros((16, 16), np.float32)
    a[0, 0], b[0, 0] = 0x0040, 0x7000  # a denormal number times a large one
    a[1, 2], b[1, 2] = 0x0080, 0x3F00  # half the smallest normal number
    sums[2, 2] = 2.0**-127
    products.add_products(at(a), at(b), at(sums))
    assert not sums.any()


@pytest.mark.parametrize("depth", SIZES)
@pytest.mark.parametrize("add", [False, True])
def test_any_number_of_rows_and_columns_of_any_depth(products: ctypes.CDLL, depth: int, add: bool) -> None:
    """What stands around the arrays is NaN: it is not read into sums, and not written."""
    rng = np.random.default_rng(depth)
    for count in SIZES:
        for columns in (16, 32, 48, 64, 80):
            rows, matrix = whole_numbers(rng, count, depth), whole_numbers(rng, depth, columns)
            begin = whole_numbers(rng, count, columns)
            left, right = surrounded(bfloat16(rows))[0], surrounded(bfloat16(pairs_of(matrix)))[0]
            totals, room = surrounded(begin)
            outside = room.copy()
            sizes = [ctypes.c_int64(size) for size in (depth, count, 2 * columns, columns, depth, columns)]
            products.multiply_by_tiles(
                at(left), sizes[0], sizes[1], at(right), *sizes[2:5], at(totals), sizes[5], int(add)
            )
            assert np.array_equal(totals, rows @ matrix + (begin if add else 0)), (count, columns)
            totals[:] = begin
            assert np.array_equal(room, outside)


@pytest.mark.parametrize("depth", SIZES)
def test_few_rows_with_a_weight(products: ctypes.CDLL, depth: int) -> None:
    rng = np.random.default_rng(depth)
    for num_rows in (*SIZES, 130):
        for count in SIZES:
            x, weight = whole_numbers(rng, num_rows, depth), whole_numbers(rng, count, depth)
            rows, factor = surrounded(bfloat16(x))[0], surrounded(bfloat16(weight))[0]
            out, room = surrounded(np.zeros((num_rows, count), np.float32))
            outside = room.copy()
            sizes = [ctypes.c_int64(size) for size in (count, depth, num_rows)]
            products.multiply_packed_rows(at(factor), sizes[0], sizes[1], at(rows), sizes[2], at(out))
            assert np.array_equal(out, x @ weight.T), (num_rows, count)
            out[:] = 0
            assert np.array_equal(room, outside)


@pytest.mark.parametrize(
    ("flags", "state", "said"),
    [
        ([*EMULATED, *BUILDS["f_bw_vnni_bf16"][1]], 0, "without one"),
        (REFUSED, 1, "the operating system refuses"),
        (EMULATED_AMX, 2, "use the processor's matrix unit"),
    ],
    ids=["missing", "refused", "granted"],
)
def test_what_is_used_is_logged(
    flags: list[str], state: int, said: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    opened = native._opened(compiled(native._SOURCES / "amx.cpp", flags, tmp_path))
    assert opened.matrix_unit() == state
    assert [said in record.message for record in caplog.records] == [True]
    assert caplog.records[0].levelno == (logging.WARNING if state == 1 else logging.INFO)


def test_the_operating_system_is_asked(tmp_path: Path) -> None:
    """Really: a processor without tiles is refused them."""
    state = ctypes.CDLL(str(compiled(native._SOURCES / "amx.cpp", REAL, tmp_path))).matrix_unit()
    assert state in (1, 2) if HAS_AMX else state == 1


@pytest.mark.slow
@pytest.mark.parametrize(("flags", "state"), [(EMULATED_AMX, 2), (REFUSED, 1)], ids=["granted", "refused"])
def test_all_kernels(flags: list[str], state: int, tmp_path: Path) -> None:
    libraries = kernels_as_tested_with(flags, tmp_path)
    assert libraries and all(library.matrix_unit() == state for library in libraries)
