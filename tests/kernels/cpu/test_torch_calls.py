"""Every operator that is computed natively gives what torch gives, for any layout, dtype, and odd size."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from autodeploy.kernels.cpu.torch_calls import _TRANSLATIONS, compute_natively

INF, NAN = float("inf"), float("nan")
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 8e-3}  # bfloat16: one unit in the last place
Make = Callable[..., Tensor]


def operator(name: str) -> Any:
    _, packet, overload = name.split(".")
    return getattr(getattr(torch.ops.aten, packet), overload)


def unary(x: Make) -> list[Any]:
    return [(x(3, 7),), (x(1, 5, 300),), (x(2, 3, 1, 40).transpose(1, 3),), (x(()),), (x(0, 4),)]


def positive(x: Make) -> list[Any]:
    return [(x(3, 7).abs() + 0.1,), (x(1, 5, 300).abs() + 0.1,)]


def binary(x: Make) -> list[Any]:
    pairs = [(x(3, 7), x(3, 7)), (x(1, 4, 1, 8).transpose(1, 2), x(1, 1, 1, 8)), (x(5, 1), x(1, 300)), (x(2, 9), x(()))]
    return [*pairs, (x(3, 7), x(7).float()), (torch.arange(9), x(9)), (torch.arange(9), torch.arange(9) % 4)]


def scalar(x: Make) -> list[Any]:
    return [(x(3, 7), 0.5), (x(1, 300), -2), (torch.arange(9), 3)]


def both(x: Make) -> list[Any]:
    return [*binary(x), *scalar(x)]


def comparison(x: Make) -> list[Any]:
    rounded = x(4, 30).mul(2).round()
    return [(rounded, rounded.flip(0)), (torch.arange(9), torch.arange(9).flip(0))]


def comparison_with_number(make: Make) -> list[Any]:
    x = make(4, 30).mul(2).round()
    x[0, :3] = 0.3
    return [(x, 1.0), (x, 0.3), (torch.arange(9), 4)]


def cat(x: Make) -> list[Any]:
    return [([x(1, 3, 8), x(1, 3, 5)], -1), ([x(2, 3), x(4, 3), x(1, 3)],), ([x(2, 3).float(), x(2, 3)], 1)]


def rows(x: Make) -> list[Any]:
    return [(x(3, 7).contiguous(), [-1], True), (x(2, 4, 70).contiguous(), [2]), (x(2, 3, 5).contiguous(), [1, 2])]


def indices(x: Make, high: int, *shape: int) -> Tensor:
    return torch.randint(0, high, shape)


CASES: dict[str, Callable[[Make], list[Any]]] = {
    "to.dtype": lambda x: [(x(3, 40), torch.float32), (x(3, 40), torch.bfloat16), (torch.arange(5), torch.float32)],
    "to.device": lambda x: [(x(3, 40), torch.device("cpu"), torch.float32, False, True)],
    "to.dtype_layout": lambda x: [(x(3, 4),)],
    "to.other": lambda x: [(x(3, 4), torch.ones(1))],
    "_to_copy.default": lambda x: [(x(3, 4),), (x(5, 5) > 0,), (torch.arange(5, dtype=torch.int32),)],
    "clone.default": lambda x: [(x(3, 4),), (x(2, 3, 4, 5).permute(3, 0, 2, 1),), (torch.arange(70),), (x(0),)],
    "contiguous.default": lambda x: [(x(3, 4).t(),)],
    "type_as.default": lambda x: [(x(3, 4), torch.ones(1))],
    "expand_copy.default": lambda x: [(x(3, 1), [3, 4])],
    "lift_fresh_copy.default": unary,
    "reshape.default": lambda x: [(x(3, 4).t(), [2, 6]), (x(2, 3, 4).transpose(0, 1), [3, 8])],
    "flatten.using_ints": lambda x: [(x(2, 3, 4).transpose(0, 1), 1)],
    "_reshape_copy.default": lambda x: [(x(2, 3, 4), [6, 4])],
    "copy.default": lambda x: [(x(3, 4), x(3, 4)), (x(3, 4), x(4).float())],
    "zeros_like.default": unary,
    "ones_like.default": unary,
    "full_like.default": lambda x: [(x(3, 4), -INF), (torch.arange(3), 7)],
    "new_zeros.default": lambda x: [(x(3), [2, 5])],
    "new_ones.default": lambda x: [(x(3), [2, 5])],
    "zeros.default": lambda x: [([2, 5],)],
    "ones.default": lambda x: [([2, 5],)],
    "full.default": lambda x: [([2, 5], 0.25)],
    **{f"{name}.default": unary for name in ("neg", "abs", "square", "exp", "cos", "sin", "tanh", "floor")},
    **{f"{name}.default": unary for name in ("sigmoid", "silu", "relu", "softplus")},
    **{f"{name}.default": positive for name in ("sqrt", "rsqrt", "reciprocal", "log", "log1p")},
    "gelu.default": unary,
    "bitwise_not.default": lambda x: [(x(3, 4) > 0,)],
    "logical_not.default": lambda x: [(x(3, 4) > 0,)],
    **{f"{name}.Tensor": both for name in ("add", "sub", "mul")},
    **{f"{name}.Scalar": scalar for name in ("add", "sub", "mul", "rsub")},
    "rsub.Tensor": binary,
    "div.Tensor": lambda x: [(x(3, 7), x(3, 7).abs() + 1), (x(3, 7), 3.0)],
    "div.Scalar": lambda x: [(x(3, 7), 3.0)],
    "maximum.default": lambda x: [(x(3, 7), x(3, 7)), (torch.arange(9), torch.arange(9).flip(0))],
    "minimum.default": lambda x: [(x(3, 7), x(3, 7)), (torch.arange(9), torch.arange(9).flip(0))],
    "pow.Tensor_Scalar": lambda x: [(x(3, 7), 2), (x(3, 7), 3), (x(3, 7).abs() + 0.1, -0.5)],
    "clamp.default": lambda x: [(x(3, 7), -0.5, 0.25), (x(3, 7), None, 0.3), (x(3, 7), 0.1)],
    "clamp_min.default": lambda x: [(x(3, 7), 0.5)],
    "clamp_max.default": lambda x: [(x(3, 7), 0.5)],
    "where.self": lambda x: [(x(3, 7) > 0, x(3, 7), x(1, 7)), (x(4) > 0, torch.arange(4), torch.zeros(4).long())],
    "where.ScalarSelf": lambda x: [(x(3, 7) > 0, 1.5, x(3, 7))],
    "where.ScalarOther": lambda x: [(x(3, 7) > 0, x(3, 7), -INF)],
    "where.Scalar": lambda x: [(x(3, 7) > 0, 1.5, 2.5)],
    "masked_fill.Scalar": lambda x: [(x(3, 7), x(3, 7) > 0, -INF), (x(3, 7), x(1, 7) > 0, 0.0)],
    **dict.fromkeys(("cat.default", "concat.default", "concatenate.default"), cat),
    "stack.default": lambda x: [([x(2, 3), x(2, 3)], -1), ([x(4), x(4), x(4)],)],
    "slice_scatter.default": lambda x: [(x(3, 8), x(3, 4), 1, 2, 6), (x(6, 2), x(3, 2), 0, 0, 6, 2)],
    "repeat_interleave.self_int": lambda x: [(x(2, 5), 3, -1), (x(2, 5), 2, 0)],
    "sum.dim_IntList": rows,
    "mean.dim": rows,
    "softmax.int": lambda x: [(x(3, 70).contiguous(), -1), (x(2, 5).contiguous(), 1, torch.float32)],
    "_softmax.default": lambda x: [(x(3, 70).contiguous(), -1, False)],
    "topk.default": lambda x: [(x(3, 70).contiguous(), 4), (x(2, 200).contiguous(), 1), (x(6).contiguous(), 6)],
    "embedding.default": lambda x: [(x(9, 5).contiguous(), indices(x, 9, 1, 4))],
    "index_select.default": lambda x: [(x(2, 6, 3).contiguous(), 1, indices(x, 6, 4).int())],
    "index.Tensor": lambda x: [
        (x(2, 6, 3).contiguous(), [None, indices(x, 6, 4)]),
        (x(2, 6, 3).contiguous(), [None, indices(x, 6, 4) - 6]),
        (x(6).contiguous(), [indices(x, 6, 2, 2)]),
    ],
    "gather.default": lambda x: [(x(3, 8).contiguous(), -1, indices(x, 8, 3, 2))],
    "scatter.value": lambda x: [(x(3, 8).contiguous(), -1, torch.tensor([[1, 7], [0, 2], [5, 3]]), 0.3)],
    "scatter.src": lambda x: [(x(3, 8).contiguous(), 1, torch.tensor([[1, 7], [0, 2], [5, 3]]), x(3, 2).contiguous())],
    **{f"{name}.Tensor": comparison for name in ("eq", "ne", "lt", "le", "gt", "ge")},
    **{f"{name}.Scalar": comparison_with_number for name in ("eq", "ne", "lt", "le", "gt", "ge")},
}


def contiguous(dtype: torch.dtype) -> Make:
    return lambda *shape: (2 * torch.randn(*shape)).to(dtype)


def columns(dtype: torch.dtype) -> Make:
    """Every other column of the middle of a wider tensor."""

    def make(*shape: Any) -> Tensor:
        if shape == ((),):
            return torch.randn(()).to(dtype)
        return (2 * torch.randn(*shape[:-1], 2 * shape[-1] + 3)).to(dtype)[..., 2 : 2 + 2 * shape[-1] : 2]

    return make


def results(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)


def test_every_translation_has_a_case() -> None:
    assert {f"aten.{name}" for name in CASES} == set(_TRANSLATIONS)


@pytest.mark.parametrize("layout", [contiguous, columns])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_gives_what_torch_gives(name: str, dtype: torch.dtype, layout: Callable[[torch.dtype], Make]) -> None:
    torch.manual_seed(0)
    func = operator(f"aten.{name}")
    for case in CASES[name](layout(dtype)):
        expected = results(func(*case))
        mine = [torch.full_like(value, 77) for value in expected]
        assert compute_natively(func, case, {}, mine), case
        for value, wanted in zip(mine, expected, strict=True):
            tolerance = TOLERANCE.get(wanted.dtype, 0.0)
            torch.testing.assert_close(value, wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["add.Tensor", "mul.Tensor", "sub.Tensor", "rsub.Scalar", "div.Tensor"])
def test_arithmetic_in_bfloat16_rounds_as_torch_does(name: str) -> None:
    torch.manual_seed(0)
    x, number = torch.randn(40, 100).bfloat16(), 0.3
    for case in [(x, number)] if name == "rsub.Scalar" else [(x, x.flip(0)), (x, number)]:
        func = operator(f"aten.{name}")
        mine = torch.empty_like(x)
        assert compute_natively(func, case, {}, [mine])
        assert torch.equal(mine, func(*case))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("is_sorted", [True, False])
@pytest.mark.parametrize(("width", "k"), [(8, 2), (8, 8), (64, 1), (128, 2), (130, 2), (256, 8), (160, 6), (512, 8)])
def test_of_equal_elements_those_that_torch_chooses(width: int, k: int, is_sorted: bool, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randint(0, 5, (200, width)).to(dtype)
    x[3, 2] = NAN
    expected = torch.topk(x, k, sorted=is_sorted)
    mine = [torch.empty_like(value) for value in expected]
    assert compute_natively(torch.ops.aten.topk.default, (x, k, -1, True, is_sorted), {}, mine)
    torch.testing.assert_close(mine[0], expected.values, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(mine[1], expected.indices)


@pytest.mark.parametrize("name", ["exp", "sigmoid", "silu", "relu", "tanh", "softplus", "log", "sqrt", "rsqrt", "neg"])
def test_infinities_nan_and_zero(name: str) -> None:
    x = torch.tensor([INF, -INF, NAN, 0.0, -0.0, 1e-38, 88.7, -88.7, 89.0, -104.0, 1e20, -1e20, 30.0, -30.0])
    func, mine = operator(f"aten.{name}.default"), torch.empty_like(x)
    assert compute_natively(func, (x,), {}, [mine])
    torch.testing.assert_close(mine, func(x), equal_nan=True)


def test_extremes_and_comparisons_of_nan() -> None:
    x, y = torch.tensor([NAN, 1.0, NAN, 2.0]), torch.tensor([0.0, NAN, NAN, 1.0])
    for name in ("maximum.default", "minimum.default", "eq.Tensor", "ne.Tensor", "lt.Tensor", "ge.Tensor"):
        func = operator(f"aten.{name}")
        expected = func(x, y)
        mine = torch.empty_like(expected)
        assert compute_natively(func, (x, y), {}, [mine])
        torch.testing.assert_close(mine, expected, equal_nan=True)


@pytest.mark.parametrize("index", [-1, 9])
def test_an_index_outside_is_an_error(index: int) -> None:
    x, at = torch.ones(2, 9), torch.tensor([[0], [index]])
    gather, scatter = torch.ops.aten.gather.default, torch.ops.aten.scatter.value
    with pytest.raises(IndexError, match="outside"):
        compute_natively(gather, (x, 1, at), {}, [torch.empty(2, 1)])
    with pytest.raises(IndexError, match="outside"):
        compute_natively(scatter, (x, 1, at, 2.0), {}, [torch.empty(2, 9)])


@pytest.mark.parametrize("index", [-10, 9])
def test_an_index_from_the_end_may_be_outside_too(index: int) -> None:
    given = (torch.ones(2, 9), [None, torch.tensor([-9, index])])
    with pytest.raises(IndexError, match="outside"):
        compute_natively(torch.ops.aten.index.Tensor, given, {}, [torch.empty(2, 2)])


@pytest.mark.parametrize(
    ("name", "case"),
    [
        ("add.Tensor", (torch.ones(3).double(), 1.0)),
        ("mul.Tensor", (torch.ones(3, dtype=torch.float16), 2.0)),
        ("add.Tensor", (torch.ones(2, 2, 2, 2, 2).transpose(0, 4).transpose(1, 3), torch.ones(2, 2, 2, 2, 2))),
        ("_to_copy.default", (torch.ones(20000, 6)[:, :3],)),
        ("add.Tensor", (torch.arange(3), 1 << 40)),
        ("sum.dim_IntList", (torch.ones(3, 4), [0])),
        ("softmax.int", (torch.ones(3, 4), 0)),
        ("topk.default", (torch.ones(3, 4), 2, -1, False)),
        ("softplus.default", (torch.ones(3), 2.0)),
        ("cat.default", ([torch.ones(0), torch.ones(2, 2)],)),
        ("matmul.default", (torch.ones(2, 2), torch.ones(2, 2))),
    ],
)
def test_what_is_not_translated_is_left_to_torch(name: str, case: tuple[Any, ...]) -> None:
    func = operator(f"aten.{name}")
    mine = [torch.full_like(value, 7) for value in results(func(*case))]
    assert not compute_natively(func, case, {}, mine)
    assert all(bool((value == 7).all()) for value in mine)
