"""Tapes: a module's code, run on real tensors and recorded, becomes steps that can be traced for any number of tokens.

Code that decides in Python by the values of tensors cannot be traced. It can be run: a recording of two runs, of
different numbers of tokens, is cut at a tensor whose meaning is known (the sum over a token's experts, say), and what
is left, if it is the same in both, holds for every number. The caller confirms that by comparing a replay with a run of
a third number.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

LARGEST_COPY = 1 << 20
"""Elements of a tensor up to which a recording keeps its values"""

LARGEST_FACTOR = 1 << 28
"""Elements of a matrix, or of a stack of them, up to which a product is run: code that multiplies by larger ones takes
all experts at once, and torch would copy what a probe's weight shares, many gigabytes of it."""

_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.addmm.default,
             torch.ops.aten.baddbmm.default)  # fmt: skip

Length = Any
"""A number of tokens: an int while probing, a symbolic one while tracing."""


@dataclass(frozen=True)
class Made:
    """A tensor that step `step` made, as its output number `output`."""

    step: int
    output: int


@dataclass(frozen=True)
class Given:
    """A tensor that came from outside: an argument's position, or the name of a parameter or buffer."""

    key: int | str


@dataclass(frozen=True, eq=False)
class Fixed:
    """A constant that the code makes out of numbers of its own."""

    tensor: Tensor


@dataclass(frozen=True)
class Scaled:
    """A size in proportion to the number of tokens."""

    factor: int


Reference = Made | Given | Fixed


@dataclass(frozen=True)
class Step:
    """One call of a recording; tensors among the arguments are references, sizes may be `Scaled`."""

    function: OpOverload
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@dataclass(eq=False)
class Recording(TorchDispatchMode):
    """What a module did in one run: its calls, a copy of every tensor as each call left it, and its result."""

    length: int
    steps: list[Step] = field(default_factory=list)
    values: list[tuple[Tensor | None, ...]] = field(default_factory=list)
    result: Any = None

    def __post_init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._known: dict[int, Reference] = {}
        self._outputs: list[list[Any]] = []
        self._alive: list[Any] = []  # so that an id stays one tensor's
        self._storages: list[tuple[set[int], set[int]]] = []
        """what each call reads and what it updates"""

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS and any(factor.numel() > LARGEST_FACTOR for factor in args):
            raise TooLarge(f"{func} of {max(factor.numel() for factor in args):,} elements")
        step = Step(func, *tree_map_only(Tensor, self._reference, (args, kwargs)))
        reads = {_storage(value) for value in tree_flatten((args, kwargs))[0] if isinstance(value, Tensor)}
        outputs = func(*args, **kwargs)
        made = list(outputs) if isinstance(outputs, tuple | list) else [outputs]
        updates = {_storage(value) for value in _updated(func, args, kwargs)}
        for number, value in enumerate(made):
            if isinstance(value, Tensor) and (not updates or id(value) not in self._known):
                self._known[id(value)] = Made(len(self.steps), number)
        self._alive.append((args, kwargs))
        self._outputs.append(made)
        self.steps.append(step)
        self.values.append(tuple(_copy(value) for value in made))
        self._storages.append((reads, updates))
        return outputs

    def record(self, module: nn.Module, arguments: Sequence[Tensor]) -> None:
        """Run a module on real tensors.

        Raises:
            TooLarge: a product's factor is beyond `LARGEST_FACTOR`.
        """
        self._known |= {id(argument): Given(position) for position, argument in enumerate(arguments)}
        named = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
        self._known |= {id(tensor): Given(name) for name, tensor in named}
        self._alive.append(arguments)
        with torch.no_grad(), self:
            result = module(*arguments)
        self.result = tree_map_only(Tensor, self._reference, result)

    def _reference(self, tensor: Tensor) -> Reference:
        return self._known[id(tensor)] if id(tensor) in self._known else Fixed(tensor)

    def made_by(self, step: int, output: int) -> Reference:
        """The reference of what a step returned; one that updates in place returns what an earlier one made."""
        return self._known[id(self._outputs[step][output])]

    def kept(self, cut: int, needs: Sequence[Reference]) -> list[int]:
        """The steps that the result needs, when the one at `cut` is replaced by something that reads `needs`."""
        wanted = {ref for ref in tree_flatten(self.result)[0] if isinstance(ref, Made)}
        storages = {self._storage_of(ref) for ref in wanted}
        kept = []
        for index in reversed(range(len(self.steps))):
            mine = {self.made_by(index, n) for n, v in enumerate(self._outputs[index]) if isinstance(v, Tensor)}
            _, updates = self._storages[index]
            if not mine & wanted and not updates & storages:
                continue
            kept.append(index)
            if index == cut:
                storages -= {self._storage_of(ref) for ref in mine if isinstance(ref, Made)}
                wanted -= mine
                used: Sequence[Any] = needs
            else:
                used = tree_flatten((self.steps[index].args, self.steps[index].kwargs))[0]
            wanted |= {ref for ref in used if isinstance(ref, Made)}
            storages |= {self._storage_of(ref) for ref in used if isinstance(ref, Made)}
        return kept[::-1]

    def _storage_of(self, reference: Made) -> int:
        return _storage(self._outputs[reference.step][reference.output])


class TooLarge(Exception):
    """What a module computes is too much to try."""


class Unrepeatable(Exception):
    """Two recordings do not agree on what is done for every number of tokens."""


@dataclass(frozen=True)
class Program:
    """Steps that hold for any number of tokens, one of them replaced by a function of its own inputs."""

    steps: tuple[tuple[int, Step | None], ...]
    """(the number by which later steps refer to it, the step or None for the replaced one)"""
    replaced: Reference
    shape: tuple[Any, ...]
    needs: tuple[Reference, ...]
    result: Any

    def depends_on_values(self) -> bool:
        """True when what a step gives has a size, or is a number, that depends on values of tensors."""
        tags = {torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output}
        return any(step is not None and tags & set(step.function.tags) for _, step in self.steps)

    def reads(self) -> set[str]:
        """Names of the parameters and buffers that the steps read."""
        leaves = tree_flatten([self.needs, self.result, *((s.args, s.kwargs) for _, s in self.steps if s)])[0]
        return {leaf.key for leaf in leaves if isinstance(leaf, Given) and isinstance(leaf.key, str)}

    def run(
        self,
        arguments: Sequence[Tensor],
        weights: Callable[[str], Tensor],
        length: Length,
        replacement: Callable[..., Tensor],
    ) -> Any:
        """Run the steps.

        Args:
            arguments: of the module.
            weights: gives a parameter or buffer of the module by name.
            length: number of tokens.
            replacement: called with what the replaced step `needs`; its result is reshaped to that step's shape.
        """
        made: dict[Reference, Any] = {}

        def value(leaf: Any) -> Any:
            if isinstance(leaf, Scaled):
                return leaf.factor * length
            if isinstance(leaf, Given) and leaf not in made:
                return arguments[leaf.key] if isinstance(leaf.key, int) else weights(leaf.key)
            if isinstance(leaf, Fixed):
                return leaf.tensor
            return made[leaf] if isinstance(leaf, Given | Made) else leaf

        for number, step in self.steps:
            if step is None:
                given = replacement(*(value(need) for need in self.needs))
                made[self.replaced] = given.reshape([value(size) for size in self.shape])
                continue
            outputs = step.function(*_map(value, step.args), **_map(value, step.kwargs))
            for output, tensor in enumerate(outputs if isinstance(outputs, tuple | list) else [outputs]):
                made[Made(number, output)] = tensor
        return _map(value, self.result)


def program(first: Recording, second: Recording, cuts: tuple[int, int], needs: tuple[Any, Any]) -> Program:
    """What two recordings have in common when each is cut at a step.

    Args:
        cuts: the step of each recording, with one output, that is replaced.
        needs: references that the replacement reads, in each recording.
    Raises:
        Unrepeatable: they differ in more than sizes in proportion to their lengths.
    """
    kept = [r.kept(cut, need) for r, cut, need in zip((first, second), cuts, needs, strict=True)]
    if len(kept[0]) != len(kept[1]):
        raise Unrepeatable("the numbers of steps differ")
    merge = _Merge(first.length, second.length, dict(zip(*kept, strict=True)))
    steps: list[tuple[int, Step | None]] = []
    for one, other in zip(*kept, strict=True):
        a, b = first.steps[one], second.steps[other]
        if (one == cuts[0]) != (other == cuts[1]) or (one != cuts[0] and a.function != b.function):
            raise Unrepeatable(f"{a.function} against {b.function}")
        same = None if one == cuts[0] else Step(a.function, merge(a.args, b.args), merge(a.kwargs, b.kwargs))
        steps.append((one, same))
    shapes = [tuple(r.values[cut][0].shape) for r, cut in zip((first, second), cuts, strict=True)]  # type: ignore[union-attr]
    replaced = merge(first.made_by(cuts[0], 0), second.made_by(cuts[1], 0), defining=True)
    return Program(tuple(steps), replaced, merge(*shapes), tuple(merge(*needs)), merge(first.result, second.result))


@dataclass(frozen=True)
class _Merge:
    """Two values that differ at most in sizes become one; steps are numbered as in the first."""

    first: int
    second: int
    numbers: Mapping[int, int]

    def __call__(self, one: Any, other: Any, *, defining: bool = False) -> Any:
        leaves, form = tree_flatten(one)
        others, other_form = tree_flatten(other)
        if form != other_form:
            raise Unrepeatable(f"{one} against {other}")
        return tree_unflatten([self._leaf(a, b, defining) for a, b in zip(leaves, others, strict=True)], form)

    def _leaf(self, one: Any, other: Any, defining: bool) -> Any:
        if isinstance(one, Made) and isinstance(other, Made):
            agree = defining or self.numbers.get(one.step) == other.step or one.step not in self.numbers
            if agree and one.output == other.output:
                return one
        elif isinstance(one, Fixed) and isinstance(other, Fixed):
            if torch.equal(one.tensor, other.tensor):
                return one
        elif type(one) is type(other) and one == other:
            return one
        elif type(one) is int and type(other) is int and one * self.second == other * self.first:
            return Scaled(one // self.first)
        raise Unrepeatable(f"{one} against {other}")


def _copy(value: Any) -> Tensor | None:
    is_small = isinstance(value, Tensor) and value.numel() <= LARGEST_COPY
    return value.clone() if is_small else None


def _map(function: Callable[[Any], Any], tree: Any) -> Any:
    leaves, form = tree_flatten(tree)
    return tree_unflatten([function(leaf) for leaf in leaves], form)


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


def _updated(func: OpOverload, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[Tensor]:
    """The tensors that a call updates in place."""
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            if isinstance(value, Tensor):
                yield value
