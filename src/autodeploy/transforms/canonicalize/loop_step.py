"""One step of a rolled loop on numbers: its body and random input go in, any value inside comes out, in float64.

What a step does to what it carries is found by running it: on zeros, on unit vectors, on random values. What it does it
with is found among the values that it computes from the token and constants alone, by comparing numbers.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from autodeploy.ops.recurrence import Body, call_operator

Ref = tuple[str, int]
"""A value of a body: its kind (token, constant, carried, result of a call) and its number."""
Shape = tuple[int, ...]
Form = tuple[Shape, torch.dtype]
"""shape and dtype of one token's tensor, a constant, or a carried value"""

TOLERANCE = 1e-9
"""of two numbers that are the same but for the order of rounding, in float64"""


def as_ref(value: object) -> Ref | None:
    """A body's way to write a value (`["x", 0]`) as a key; None for anything else."""
    match value:
        case [str() as kind, int() as index]:
            return kind, index
    return None


def _refs(argument: Any) -> Iterator[Ref]:
    ref = as_ref(argument)
    if ref is not None:
        yield ref
    elif isinstance(argument, list | tuple):
        for part in argument:
            yield from _refs(part)
    elif isinstance(argument, dict):
        yield from _refs(argument.get("list", ()))


@dataclass(frozen=True)
class Step:
    """A body whose values can be asked for one by one."""

    body: Body

    def widened(self, dtype: str) -> "Step":
        """The same with one floating-point dtype throughout."""

        def wide(argument: Any) -> Any:
            if isinstance(argument, dict) and argument.get("torch") in ("float32", "bfloat16", "float16"):
                return {"torch": dtype}
            if isinstance(argument, dict) and "list" in argument:
                return {"list": [wide(part) for part in argument["list"]]}
            return argument

        calls = tuple(
            (name, [wide(argument) for argument in args], {key: wide(value) for key, value in kwargs.items()})
            for name, args, kwargs in self.body.calls
        )
        return Step(Body(calls, self.body.carries, self.body.outputs))

    def evaluate(self, refs: Sequence[Ref], given: Mapping[Ref, Any]) -> list[Any]:
        """The values behind refs, computed from the given ones and no more than that takes."""
        known = dict(given)
        for index in sorted(self._needed(refs, known)):
            known["n", index] = call_operator(self.body.calls[index], known)
        return [known[ref] for ref in refs]

    def _needed(self, refs: Sequence[Ref], known: Mapping[Ref, Any]) -> set[int]:
        found: set[int] = set()
        pending = list(refs)
        while pending:
            ref = pending.pop()
            if ref not in known and ref[0] == "n" and ref[1] not in found:
                found.add(ref[1])
                pending.extend(self._parents(ref[1]))
        return found

    def _parents(self, index: int) -> list[Ref]:
        _, args, kwargs = self.body.calls[index]
        return [*_refs(args), *_refs(list(kwargs.values()))]

    def reads(self, refs: Sequence[Ref], known: set[Ref], kinds: str = "h") -> set[Ref]:
        """Which values of some kinds reach refs other than through known ones."""
        found: set[Ref] = set()
        seen: set[Ref] = set()
        pending = list(refs)
        while pending:
            ref = pending.pop()
            if ref in known or ref in seen:
                continue
            seen.add(ref)
            if ref[0] in kinds:
                found.add(ref)
            elif ref[0] == "n":
                pending.extend(self._parents(ref[1]))
        return found

    @property
    def outputs(self) -> list[Ref]:
        return [ref for ref in map(as_ref, self.body.outputs) if ref is not None]

    @property
    def carries(self) -> list[Ref]:
        return [ref for ref in map(as_ref, self.body.carries) if ref is not None]


@dataclass(frozen=True)
class Role:
    """A value of a step as an op's argument: `scale * value`, reshaped, expanded, reshaped again; or a number.

    Attributes:
        ref: the value, or None for `fill` everywhere.
        shape, full, final: what the value is reshaped to, expanded to, and reshaped to at last.
        log: its logarithm is taken at last.
    """

    ref: Ref | None
    final: Shape
    shape: Shape = ()
    full: Shape = ()
    scale: float = 1.0
    fill: float = 0.0
    log: bool = False

    def of(self, value: Tensor) -> Tensor:
        """From a value, or from any value of the token where the role is a number."""
        if self.ref is None:
            return value.new_full(self.final, self.fill, dtype=torch.float32)
        for shape, change in ((self.shape, Tensor.reshape), (self.full, Tensor.expand), (self.final, Tensor.reshape)):
            value = value if tuple(value.shape) == shape else change(value, shape)
        return value if self.scale == 1.0 else value * self.scale


def drawn(
    shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator, wide: torch.dtype, *, positive: bool = False
) -> Tensor:
    """A random tensor: numbers in dtype `wide`, or truth values; other integers are ones, valid as indices or not."""
    if dtype == torch.bool:
        return torch.rand(*shape, generator=generator) < 0.5
    if not dtype.is_floating_point:
        return torch.ones(*shape, dtype=dtype)
    draw = torch.rand if positive else torch.randn
    return draw(*shape, generator=generator, dtype=wide)


def is_same(a: Tensor, b: Tensor) -> bool:
    """Equal but for rounding, in float64."""
    limit = TOLERANCE * max(float(b.abs().max()), 1e-3)
    return a.shape == b.shape and bool((a - b).abs().max() <= limit)


@dataclass
class Probe:
    """A step with random input.

    Attributes:
        step: in float64.
        given: tokens, constants and carried values.
        known: values that an op gives already, which therefore count as the token's own.
    """

    step: Step
    given: dict[Ref, Tensor]
    known: set[Ref] = field(default_factory=set)
    _values: dict[Ref, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, step: Step, tokens: Sequence[Form], constants: Sequence[Form], carried: Sequence[Form]) -> "Probe":
        generator = torch.Generator().manual_seed(0)
        given: dict[Ref, Tensor] = {}
        for kind, forms in (("x", tokens), ("c", constants), ("h", carried)):
            for index, (shape, dtype) in enumerate(forms):
                given[kind, index] = drawn(shape, dtype, generator, torch.float64)
        return cls(step.widened("float64"), given)

    def value(self, ref: Ref) -> Any:
        if ref not in self._values:
            (self._values[ref],) = self.step.evaluate([ref], self.given | self._values)
        return self._values[ref]

    def carry(self, index: int, state: Tensor) -> Tensor:
        """What is carried on in place `index` when `state` came in there; everything else as it is."""
        pinned = {ref: self.value(ref) for ref in self.known}
        (value,) = self.step.evaluate([self.step.carries[index]], self.given | pinned | {("h", index): state})
        tensor: Tensor = value
        return tensor

    def own_values(self, *, constant: bool = False) -> Iterator[tuple[Ref, Tensor]]:
        """Values that no carried value reaches: constants alone, or those of the token as well."""
        calls = [("n", index) for index in range(len(self.step.body.calls))]
        for ref in [*self.given, *calls]:
            kinds = "hx" if constant else "h"
            if self.step.reads([ref], set() if constant else self.known, kinds):
                continue
            value = self.value(ref)
            if isinstance(value, Tensor) and value.is_floating_point():
                yield ref, value

    def mixed_values(self, index: int) -> Iterator[tuple[Ref, Tensor]]:
        """Results that one carried value reaches, and no other."""
        for number in range(len(self.step.body.calls)):
            if self.step.reads([("n", number)], self.known) == {("h", index)}:
                value = self.value(("n", number))
                if isinstance(value, Tensor) and value.is_floating_point():
                    yield ("n", number), value

    def roles(self, full: Shape, final: Shape, *, constant: bool = False) -> list[tuple[Role, Tensor]]:
        """What can stand for an argument of shape `final`.

        Either a value that broadcasts to `full`, or one with as many elements as `final` has, in rows or columns too.
        """
        found: list[tuple[Role, Tensor]] = []
        for ref, value in self.own_values(constant=constant):
            shapes = [(shape, final) for shape in _rows_and_columns(final) if math.prod(shape) == value.numel()]
            if value.dim() <= len(full) and _broadcasts(value.shape, full):
                shapes.append((tuple(value.shape), full))
            for shape, spread in dict.fromkeys(shapes):
                role = Role(ref, final, shape, spread)
                found.append((role, role.of(value)))
        return found


def _rows_and_columns(final: Shape) -> list[Shape]:
    if len(final) != 2:
        return [final]
    return list(dict.fromkeys([final, (1, final[1]), (final[0], 1)]))


def _broadcasts(shape: Sequence[int], full: Shape) -> bool:
    ends = full[len(full) - len(shape) :]
    return all(size in (1, wanted) for size, wanted in zip(shape, ends, strict=True))


def find_role(roles: Sequence[tuple[Role, Tensor]], wanted: Tensor, *, log: bool = False) -> Role | None:
    """The first role with these numbers; a number alone where all are the same."""
    for role, value in roles:
        if is_same(value, wanted):
            return replace(role, log=log)
    first = float(wanted.flatten()[0])
    if is_same(torch.full_like(wanted, first), wanted) and (first > 0 or not log):
        return Role(None, tuple(wanted.shape), fill=math.log(first) if log else first)
    return None
