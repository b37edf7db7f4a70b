import gc
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from autodeploy.checkpoint.quantize import Float4Format, Float8Format, NumberFormat, WeightFormat, quantize_rows
from autodeploy.checkpoint.recipe import (
    Cast,
    Concat,
    Pointwise,
    Quantize,
    Recipe,
    Reshape,
    Slice,
    Source,
    Transpose,
    evaluate,
    evaluate_quantized,
)
from autodeploy.errors import CheckpointError, TransformError

F32, BF16 = torch.float32, torch.bfloat16


def stored(name: str, shape: tuple[int, ...]) -> Tensor:
    """What the checkpoint of these tests holds under `name`: float32 values that bfloat16 must round."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(map(ord, name))))


@st.composite
def recipes(draw: st.DrawFn, shape: tuple[int, ...] | None = None, depth: int = 3) -> Recipe:
    """A random recipe of two dimensions, of a given shape if one is given."""
    rows, columns = shape or draw(st.tuples(st.integers(1, 5), st.integers(1, 5)))
    kind = (
        draw(st.sampled_from(["source", "slice", "concat", "cast", "transpose", "reshape", "pointwise"]))
        if depth
        else "source"
    )
    if kind == "slice":
        before, after = draw(st.tuples(st.integers(0, 2), st.integers(0, 2)))
        return Slice(draw(recipes((rows, columns + before + after), depth - 1)), 1, before, columns)
    if kind == "concat" and rows > 1:
        first = draw(st.integers(1, rows - 1))
        parts = [draw(recipes((count, columns), depth - 1)) for count in (first, rows - first)]
        return Concat(tuple(Cast(part, F32) for part in parts), 0)
    if kind == "cast":
        return Cast(draw(recipes((rows, columns), depth - 1)), draw(st.sampled_from([F32, BF16, torch.float64])))
    if kind == "transpose":
        return Transpose(draw(recipes((columns, rows), depth - 1)), 0, 1)
    if kind == "pointwise":
        of = draw(recipes((rows, columns), depth - 1))
        operator, numbers = draw(
            st.sampled_from([("neg.default", ()), ("mul.Tensor", (2.5,)), ("clamp.default", (None, 1))])
        )
        return Pointwise(of, operator, numbers, of.dtype)
    if kind == "reshape":
        return Reshape(draw(recipes((1, rows * columns), depth - 1)), (rows, columns))
    return Source(
        draw(st.sampled_from("abc")) + f"{rows}x{columns}", (rows, columns), draw(st.sampled_from([F32, BF16]))
    )


def expected(recipe: Recipe) -> Tensor:
    """The recipe's meaning, written the plain way."""
    match recipe:
        case Source(name, shape, dtype):
            return stored(name, shape).to(dtype)
        case Slice(of, dim, start, length):
            return torch.split(expected(of), [start, length, of.shape[dim] - start - length], dim)[1]
        case Concat(parts, dim):
            return torch.cat([expected(part) for part in parts], dim)
        case Cast(of, dtype):
            return expected(of).to(dtype)
        case Transpose(of, dim0, dim1):
            return expected(of).swapaxes(dim0, dim1)
        case Reshape(of, shape):
            return expected(of).reshape(shape)
        case Pointwise(of, "neg.default"):
            return -expected(of)
        case Pointwise(of, "mul.Tensor", (factor,)):
            return expected(of) * factor
        case Pointwise(of, "clamp.default", (None, most)):
            return expected(of).clamp(max=most)


@given(recipes())
def test_evaluates_to_its_meaning(recipe: Recipe) -> None:
    want = expected(recipe)
    assert (recipe.shape, recipe.dtype) == (tuple(want.shape), want.dtype)
    got = evaluate(recipe, _read)
    assert got.dtype == want.dtype
    torch.testing.assert_close(got, want, rtol=0, atol=0)
    out = torch.full(recipe.shape, torch.nan, dtype=recipe.dtype)
    assert evaluate(recipe, _read, out) is out
    torch.testing.assert_close(out, want, rtol=0, atol=0)


@given(recipes())
def test_reads_exactly_its_sources(recipe: Recipe) -> None:
    names: list[str] = []

    def read(name: str) -> Tensor:
        names.append(name)
        return _read(name)

    evaluate(recipe, read)
    assert tuple(names) == recipe.sources()


def test_a_recipe_is_a_value() -> None:
    def make() -> Recipe:
        return Concat((Source("q", (2, 4), F32), Slice(Source("kv", (6, 4), F32), 0, 2, 3)), 0)

    assert make() == make() and hash(make()) == hash(make())
    assert str(Transpose(Cast(make(), BF16), 0, 1)) == (
        "transpose(cast(concat(q, slice(kv, dim=0, 2:5), dim=0), bfloat16), 0, 1)"
    )
    assert (
        str(Pointwise(Pointwise(make(), "exp.default", (), F32), "mul.Tensor", (2,), F32)) == f"mul(exp({make()}), 2)"
    )


@pytest.mark.parametrize("cast", [False, True])
def test_a_concat_holds_one_source_at_a_time_and_writes_in_place(cast: bool) -> None:
    parts = tuple(Source(f"{i}", (3, 4), F32) for i in range(4))
    recipe: Recipe = Cast(Concat(parts, 0), BF16) if cast else Concat(parts, 0)
    alive: list[weakref.ref[Tensor]] = []

    def read(name: str) -> Tensor:
        gc.collect()
        assert all(ref() is None for ref in alive), "the previous source is still held"
        tensor = torch.full((3, 4), float(name))
        alive.append(weakref.ref(tensor))
        return tensor

    out = torch.empty(recipe.shape, dtype=recipe.dtype)
    with _Allocations() as allocated:
        evaluate(recipe, read, out)
    assert out[:, 0].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert max(allocated.numels) <= 12, "something as large as the whole was allocated"


def test_stacked_parts_are_written_in_place() -> None:
    parts = tuple(Source(f"{i}", (3, 4), F32) for i in range(5))
    stacked = Reshape(Concat(parts, 0), (5, 3, 4))
    out = torch.empty(stacked.shape)
    with _Allocations() as allocated:
        evaluate(stacked, lambda name: torch.full((3, 4), float(name)), out)
    assert out[:, 1, 2].tolist() == [0, 1, 2, 3, 4] and max(allocated.numels) <= 12


def test_interleaved_rows_come_apart_in_one_reading() -> None:
    rows = Source("w", (2, 6, 4), F32)
    apart = Reshape(Transpose(Reshape(rows, (2, 3, 2, 4)), 1, 2), (2, 6, 4))
    weight = torch.arange(48.0).view(2, 6, 4)
    expected = torch.cat((weight[:, ::2], weight[:, 1::2]), 1)
    assert apart.sources() == ("w",)
    assert torch.equal(evaluate(apart, lambda _: weight), expected)
    assert torch.equal(evaluate(apart, lambda _: weight, torch.empty(2, 6, 4)), expected)


INT4 = NumberFormat(4, 32, has_offsets=True)


def test_quantised_parts_are_those_of_the_whole_matrix() -> None:
    parts = tuple(Source(f"{name}", (rows, 64), F32) for name, rows in (("a", 32), ("b", 8), ("c", 17)))
    matrix = torch.cat([stored(part.name, part.shape) for part in parts])
    whole = quantize_rows(matrix, INT4)
    read = lambda name: stored(name, next(part.shape for part in parts if part.name == name))  # noqa: E731
    for part in ("numbers", "scales", "offsets"):
        recipe = Quantize(Concat(parts, 0), INT4, part)
        made = evaluate(recipe, read)
        assert (tuple(made.shape), made.dtype) == (recipe.shape, recipe.dtype)
        assert torch.equal(made, whole[part])
        assert torch.equal(evaluate(recipe, read, torch.empty_like(made)), made)
    assert str(Quantize(parts[0], INT4, "scales")) == "scales(a, int4 per 32 inputs, with offsets)"


@pytest.mark.parametrize("number_format", [Float8Format(), Float8Format(128), Float4Format()], ids=str)
def test_parts_in_floating_point_are_those_of_the_whole_matrix(number_format: WeightFormat) -> None:
    parts = tuple(Source(f"{name}", (rows, 160), F32) for name, rows in (("a", 384), ("b", 256), ("c", 17)))
    matrix = torch.cat([stored(part.name, part.shape) for part in parts])
    whole = number_format.quantize(matrix, float(matrix.abs().max()))
    read = lambda name: stored(name, next(part.shape for part in parts if part.name == name))  # noqa: E731
    for part in number_format.parts:
        recipe = Quantize(Concat(parts, 0), number_format, part)
        made = evaluate(recipe, read)
        assert (tuple(made.shape), made.dtype) == (recipe.shape, recipe.dtype)
        assert torch.equal(made.float(), whole[part].float())
    with pytest.raises(TransformError, match=r"offsets of a .* that format has none"):
        Quantize(parts[0], number_format, "offsets")


def test_quantising_holds_one_source_and_never_the_matrix() -> None:
    """Parts of 512 rows; beside the one that is read, no more than 256 rows of anything exist at once."""
    parts = tuple(Source(f"{i}", (512, 64), BF16) for i in range(3))
    matrix = Reshape(Reshape(Concat(parts, 0), (3, 512, 64)), (1536, 64))
    alive: list[weakref.ref[Tensor]] = []

    def read(name: str) -> Tensor:
        gc.collect()
        assert all(ref() is None for ref in alive), "the previous source is still held"
        tensor = stored(name, (512, 64)).bfloat16()
        alive.append(weakref.ref(tensor))
        return tensor

    recipes = [Quantize(matrix, INT4, part) for part in ("numbers", "scales", "offsets")]
    made = {recipe: torch.empty(recipe.shape, dtype=recipe.dtype) for recipe in recipes}
    with _Allocations() as allocated:
        evaluate_quantized(made, read)
    assert len(alive) == 3, "each source is read once for all parts"
    assert max(allocated.numels) <= max(512, 4 * 256) * 64, "something as large as the whole was allocated"
    whole = quantize_rows(torch.cat([stored(part.name, (512, 64)).bfloat16() for part in parts]), INT4)
    assert all(torch.equal(tensor, whole[recipe.part]) for recipe, tensor in made.items())


def test_a_source_of_another_shape_is_named_with_both_shapes() -> None:
    with pytest.raises(CheckpointError, match=r"'w'.*\[2, 3\].*\[3, 2\]"):
        evaluate(Source("w", (3, 2), F32), lambda name: torch.zeros(2, 3))


@pytest.mark.parametrize(
    "make",
    [
        lambda w: Slice(w, 0, 3, 2),
        lambda w: Slice(w, 0, -1, 2),
        lambda w: Slice(w, 0, 2, -1),
        lambda w: Slice(w, 2, 0, 1),
        lambda w: Slice(w, -1, 0, 1),
        lambda w: Transpose(w, 0, 2),
        lambda w: Reshape(w, (3, 5)),
        lambda w: Reshape(w, (-4, -3)),
        lambda w: Concat((), 0),
        lambda w: Concat((w, Source("v", (4, 4), F32)), 0),
        lambda w: Concat((w, Source("v", (4,), F32)), 0),
        lambda w: Concat((w, Cast(w, BF16)), 0),
        lambda w: Pointwise(w, "sum.default", (), F32),
        lambda w: Quantize(w, INT4, "numbers"),
        lambda w: Quantize(w, NumberFormat(8, None), "offsets"),
        lambda w: Quantize(Reshape(w, (12,)), NumberFormat(8, None), "numbers"),
    ],
)
def test_a_recipe_that_cannot_be_is_refused_when_made(make: "type[Recipe]") -> None:
    Slice(Source("w", (4, 3), F32), 0, 0, 4), Slice(Source("w", (4, 3), F32), 0, 4, 0)  # the near miss: still within
    with pytest.raises(TransformError):
        make(Source("w", (4, 3), F32))  # type: ignore[call-arg, arg-type]


def _read(name: str) -> Tensor:
    rows, columns = name[1:].split("x")
    return stored(name, (int(rows), int(columns)))


class _Allocations(torch.utils._python_dispatch.TorchDispatchMode):
    """Notes the size of everything an op returns that has a storage of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.numels = [0]

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and func._schema.returns[0].alias_info is None:
            self.numels.append(result.numel())
        return result
