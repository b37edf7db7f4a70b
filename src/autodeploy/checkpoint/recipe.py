"""Recipes: how a final weight is made from tensors of the checkpoint, as data that transforms rewrite.

A recipe goes in with a `read(name)` function, one final tensor comes out. Recipes are values: equal recipes make equal
tensors, so they may be compared, hashed and shared. A new kind is one frozen dataclass with the members of `Source`,
added to the union and to `evaluate`.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import assert_never

import torch
from torch import Tensor
from torch._ops import OpOverload

from autodeploy.checkpoint.quantize import Part, WeightFormat
from autodeploy.errors import CheckpointError, TransformError

ReadTensor = Callable[[str], Tensor]
"""The tensor of that name in the module's state dict. The caller does not write to it; it may be a view of a file."""


@dataclass(frozen=True)
class Source:
    """One tensor under the module's own state-dict name, in the dtype that the module gives it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def sources(self) -> tuple[str, ...]:
        return (self.name,)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Slice:
    """`length` entries of `of` along `dim`, from `start`."""

    of: "Recipe"
    dim: int
    start: int
    length: int

    def __post_init__(self) -> None:
        _check_dim(self.of, self.dim)
        size = self.of.shape[self.dim]
        if not 0 <= self.start <= self.start + self.length <= size:
            raise TransformError(
                f"slice [{self.start}:{self.start + self.length}] of dimension {self.dim} of {self.of}, "
                f"which has {size} entries; a slice must lie within"
            )

    @property
    def shape(self) -> tuple[int, ...]:
        return _with_size(self.of.shape, self.dim, self.length)

    @property
    def dtype(self) -> torch.dtype:
        return self.of.dtype

    def sources(self) -> tuple[str, ...]:
        return self.of.sources()

    def __str__(self) -> str:
        return f"slice({self.of}, dim={self.dim}, {self.start}:{self.start + self.length})"


@dataclass(frozen=True)
class Concat:
    """`parts` one after another along `dim`; all of one dtype and of one shape apart from `dim`."""

    parts: tuple["Recipe", ...]
    dim: int

    def __post_init__(self) -> None:
        if not self.parts:
            raise TransformError("concat of nothing; give at least one part")
        _check_dim(self.parts[0], self.dim)
        kinds = {(part.dtype, _with_size(part.shape, self.dim, 0)) for part in self.parts}
        if len({len(part.shape) for part in self.parts}) > 1 or len(kinds) > 1:
            described = ", ".join(f"{part} {list(part.shape)} {part.dtype}" for part in self.parts)
            raise TransformError(f"concat along dimension {self.dim} of parts that do not fit together: {described}")

    @property
    def shape(self) -> tuple[int, ...]:
        return _with_size(self.parts[0].shape, self.dim, sum(part.shape[self.dim] for part in self.parts))

    @property
    def dtype(self) -> torch.dtype:
        return self.parts[0].dtype

    def sources(self) -> tuple[str, ...]:
        return tuple(name for part in self.parts for name in part.sources())

    def __str__(self) -> str:
        return f"concat({', '.join(map(str, self.parts))}, dim={self.dim})"


@dataclass(frozen=True)
class Cast:
    """`of` in another dtype. `of` is first rounded to its own dtype, as if the cast ran in the model."""

    of: "Recipe"
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.of.shape

    def sources(self) -> tuple[str, ...]:
        return self.of.sources()

    def __str__(self) -> str:
        return f"cast({self.of}, {str(self.dtype).removeprefix('torch.')})"


@dataclass(frozen=True)
class Transpose:
    """`of` with two dimensions exchanged."""

    of: "Recipe"
    dim0: int
    dim1: int

    def __post_init__(self) -> None:
        _check_dim(self.of, self.dim0)
        _check_dim(self.of, self.dim1)

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.of.shape)
        shape[self.dim0], shape[self.dim1] = shape[self.dim1], shape[self.dim0]
        return tuple(shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.of.dtype

    def sources(self) -> tuple[str, ...]:
        return self.of.sources()

    def __str__(self) -> str:
        return f"transpose({self.of}, {self.dim0}, {self.dim1})"


@dataclass(frozen=True)
class Reshape:
    """The elements of `of` in their order, as another shape. Parts stacked are a concatenation, reshaped."""

    of: "Recipe"
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if math.prod(self.shape) != math.prod(self.of.shape) or min(self.shape, default=0) < 0:
            raise TransformError(
                f"reshape of {self.of} {list(self.of.shape)} to {list(self.shape)}; the number of elements must agree"
            )

    @property
    def dtype(self) -> torch.dtype:
        return self.of.dtype

    def sources(self) -> tuple[str, ...]:
        return self.of.sources()

    def __str__(self) -> str:
        return f"reshape({self.of}, {list(self.shape)})"


@dataclass(frozen=True)
class Quantize:
    """A part of the matrix `of` with fewer bits, as the op of its format reads it; each has a recipe of its own."""

    of: "Recipe"
    number_format: WeightFormat
    part: Part

    def __post_init__(self) -> None:
        size = self.number_format.group_size
        if len(self.of.shape) != 2 or (size is not None and self.of.shape[1] % size):
            raise TransformError(
                f"{self.of} {list(self.of.shape)} as {self.number_format}; it must be a matrix of whole groups"
            )
        if self.part not in self.number_format.parts:
            raise TransformError(f"{self.part} of {self.of} as {self.number_format}; that format has none")

    @property
    def shape(self) -> tuple[int, ...]:
        num_outputs, num_inputs = self.of.shape
        return self.number_format.shape(self.part, num_outputs, num_inputs)

    @property
    def dtype(self) -> torch.dtype:
        return self.number_format.dtype(self.part)

    def sources(self) -> tuple[str, ...]:
        return self.of.sources()

    def __str__(self) -> str:
        return f"{self.part}({self.of}, {self.number_format})"


@dataclass(frozen=True)
class Pointwise:
    """What an operator of ATen makes of `of`, each element by itself, given numbers besides.

    Attributes:
        operator: its name and overload, e.g. `exp.default`.
        numbers: its arguments behind the tensor.
        dtype: what it gives for a tensor of `of`'s dtype.
    """

    of: "Recipe"
    operator: str
    numbers: tuple[int | float | bool | None, ...]
    dtype: torch.dtype

    def __post_init__(self) -> None:
        if torch.Tag.pointwise not in self.function.tags:
            raise TransformError(
                f"{self.operator} of {self.of}; it must take each element by itself, so that the shape stays"
            )

    @property
    def function(self) -> OpOverload:
        """The operator itself. Raises AttributeError where torch has none of that name."""
        name, overload = self.operator.split(".")
        found: OpOverload = getattr(getattr(torch.ops.aten, name), overload)
        return found

    @property
    def shape(self) -> tuple[int, ...]:
        return self.of.shape

    def sources(self) -> tuple[str, ...]:
        return self.of.sources()

    def __str__(self) -> str:
        return f"{self.operator.split('.')[0]}({', '.join(map(str, (self.of, *self.numbers)))})"


Recipe = Source | Slice | Concat | Cast | Transpose | Reshape | Pointwise | Quantize


def renamed(recipe: Recipe, name_of: Callable[[str], str]) -> Recipe:
    """The recipe with other names for its sources."""
    match recipe:
        case Source():
            return replace(recipe, name=name_of(recipe.name))
        case Concat():
            return replace(recipe, parts=tuple(renamed(part, name_of) for part in recipe.parts))
        case _:
            return replace(recipe, of=renamed(recipe.of, name_of))


_ROWS_AT_ONCE = 256
"""Rows quantised at a time, a multiple of what formats take together, so that no whole matrix exists in float32."""


def evaluate(recipe: Recipe, read: ReadTensor, out: Tensor | None = None) -> Tensor:
    """Make the recipe's tensor, of the recipe's shape and dtype.

    Args:
        read: gives the tensor of a source; each source is dropped before the next one is read.
        out: where to write, of the recipe's shape and dtype, on any device, of any strides. A concatenation writes its
            parts straight into place, so that no second copy of the result exists at any time.

    Returns:
        `out`; without `out` a tensor on the CPU that may be a read-only view of what `read` gave.

    Raises:
        CheckpointError: `read` gave a tensor of another shape than its source declares.
    """
    match recipe:
        case Source():
            tensor = _read_source(recipe, read)
            return tensor.to(recipe.dtype) if out is None else out.copy_(tensor)
        case Slice():
            return _written(evaluate(recipe.of, read).narrow(recipe.dim, recipe.start, recipe.length), out)
        case Transpose() if out is not None:
            evaluate(recipe.of, read, out.transpose(recipe.dim0, recipe.dim1))
            return out
        case Transpose():
            return evaluate(recipe.of, read).transpose(recipe.dim0, recipe.dim1)
        case Reshape():
            return _reshape(recipe, read, out)
        case Cast(of=Concat(parts=parts, dim=dim)):  # cast part by part, so that the uncast whole never exists
            return evaluate(Concat(tuple(Cast(part, recipe.dtype) for part in parts), dim), read, out)
        case Cast():
            return _written(evaluate(recipe.of, read).to(recipe.dtype), out)
        case Pointwise():
            return _written(recipe.function(evaluate(recipe.of, read), *recipe.numbers), out)
        case Concat():
            return _concatenate(recipe, read, out)
        case Quantize():
            made = torch.empty(recipe.shape, dtype=recipe.dtype) if out is None else out
            evaluate_quantized({recipe: made}, read)
            return made
        case _:
            assert_never(recipe)


def _read_source(source: Source, read: ReadTensor) -> Tensor:
    tensor = read(source.name)
    if tuple(tensor.shape) != source.shape:
        raise CheckpointError(
            f"weight {source.name!r} has shape {list(tensor.shape)}, the model expects {list(source.shape)}; "
            "check that weights and config belong together"
        )
    return tensor.detach()


def _concatenate(recipe: Concat, read: ReadTensor, out: Tensor | None) -> Tensor:
    whole = torch.empty(recipe.shape, dtype=recipe.dtype) if out is None else out
    start = 0
    for part in recipe.parts:
        length = part.shape[recipe.dim]
        evaluate(part, read, whole.narrow(recipe.dim, start, length))
        start += length
    return whole


def _reshape(recipe: Reshape, read: ReadTensor, out: Tensor | None) -> Tensor:
    if out is None:
        return evaluate(recipe.of, read).reshape(recipe.shape)
    try:
        place = out.view(recipe.of.shape)  # straight into place, where the strides of `out` let it be seen so
    except RuntimeError:
        return out.copy_(evaluate(recipe.of, read).reshape(recipe.shape))
    evaluate(recipe.of, read, place)
    return out


def evaluate_quantized(parts: Mapping[Quantize, Tensor], read: ReadTensor) -> None:
    """Write several parts of one matrix in one number format; its sources are read once for all of them, or twice where
    there is a scale of the whole matrix.
    """
    ((of, number_format),) = {(recipe.of, recipe.number_format) for recipe in parts}
    largest = None
    if "tensor_scale" in number_format.parts:  # one more pass over the sources
        runs = _runs_of_rows(of, read, number_format.rows_together)
        largest = max(float(rows.abs().amax()) for rows in runs if rows.numel())
    starts = dict.fromkeys(number_format.parts, 0)
    for rows in _runs_of_rows(of, read, number_format.rows_together):
        made = number_format.quantize(rows, largest)
        for recipe, out in parts.items():
            start, part = starts[recipe.part], made[recipe.part]
            if recipe.part != "tensor_scale":
                out[start : start + len(part)].copy_(part)
            elif start == 0:
                out.copy_(part)
        starts = {name: start + len(made[name]) for name, start in starts.items()}


def _runs_of_rows(recipe: Recipe, read: ReadTensor, together: int) -> Iterator[Tensor]:
    """All rows `[..., I]` in order, some multiple of `together` at a time; parts of a concatenation after another."""
    match recipe:
        case Concat(parts=parts, dim=0) if all(math.prod(part.shape[:-1]) % together == 0 for part in parts):
            for part in parts:
                yield from _runs_of_rows(part, read, together)
        case Reshape(of=of) if of.shape[-1] == recipe.shape[-1]:
            yield from _runs_of_rows(of, read, together)
        case _:
            yield from evaluate(recipe, read).reshape(-1, recipe.shape[-1]).split(_ROWS_AT_ONCE)


def _written(tensor: Tensor, out: Tensor | None) -> Tensor:
    return tensor if out is None else out.copy_(tensor)


def _with_size(shape: tuple[int, ...], dim: int, size: int) -> tuple[int, ...]:
    return (*shape[:dim], size, *shape[dim + 1 :])


def _check_dim(recipe: Recipe, dim: int) -> None:
    if not 0 <= dim < len(recipe.shape):
        raise TransformError(
            f"dimension {dim} of {recipe}, which has shape {list(recipe.shape)}; dimensions count from 0 without sign"
        )
