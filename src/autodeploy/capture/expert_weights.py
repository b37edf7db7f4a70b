"""Readings of a module's parameters as experts: which are gates, which are products up and down, and how they lie.

A module goes in, candidates come out. For a list of alike children one child is run on random input, so that its
reading is certain; stacked parameters give every reading that their shapes allow, for the caller to try.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autodeploy.capture.experts import GateFacts, deinterleaved
from autodeploy.capture.random_weights import with_random_weights
from autodeploy.checkpoint.recipe import Concat, Recipe, Reshape, Source, Transpose
from autodeploy.ops.mlp import ACTIVATIONS

Named = Callable[[str], Tensor]
"""A parameter of the module by name."""


BLOCK = 1 << 20
"""Elements of a weight that are multiplied at once: as many as fit a processor's cache."""

_PLAIN = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Modules whose parameters are one product's, never a stack."""


@dataclass(frozen=True)
class Matrix:
    """One of each expert's matrices, and its bias.

    Attributes:
        names: the parameter of each expert, or the one parameter that holds them all.
        biases: likewise; empty without biases.
        rows, columns: as stored. transposed: rows are inputs, columns are outputs.
    """

    names: tuple[str, ...]
    biases: tuple[str, ...]
    rows: int
    columns: int
    transposed: bool = False

    @property
    def inputs(self) -> int:
        return self.rows if self.transposed else self.columns

    @property
    def outputs(self) -> int:
        return self.columns if self.transposed else self.rows

    def product(self, get: Named, expert: int, x: Tensor, first: int | None = None) -> Tensor:
        """One expert's product for tokens `[N, inputs]`, or its `first` outputs; no weight but its own is touched."""
        if len(self.names) > 1:
            bias = get(self.biases[expert])[:first] if self.biases else None
            return _linear(x, get(self.names[expert])[:first], bias)
        weight = self.stack(get)[expert]
        return _linear(x, weight[:, :first].t() if self.transposed else weight[:first])

    def stack(self, get: Named) -> Tensor:
        """The one parameter that holds them all, `[E, rows, columns]`."""
        stack = get(self.names[0])
        return stack.view(-1, self.rows, self.columns) if stack.dim() == 2 else stack


@dataclass(frozen=True)
class ExpertWeights:
    """One reading. `container` names the list of children, "" where parameters are stacked already."""

    container: str
    num_experts: int
    facts: GateFacts
    up: tuple[Matrix, ...]
    down: Matrix

    @property
    def hidden(self) -> int:
        return self.down.outputs

    def run(self, get: Named, expert: int, x: Tensor) -> Tensor:
        """One expert's result for tokens `[N, H]`."""
        return self.finish(get, expert, [matrix.product(get, expert, x) for matrix in self.up])

    def finish(self, get: Named, expert: int, ups: Sequence[Tensor], first: int | None = None) -> Tensor:
        """The result of one expert, or its `first` channels, from its products up."""
        return self.down.product(get, expert, self.facts.apply(torch.cat(list(ups), -1)), first)

    def stacked(self, get: Named) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """gate_up, down and their biases as `moe` takes them, of parameters that are stacks already."""
        ups, down = [self._stack(matrix, get) for matrix in self.up], self._stack(self.down, get)
        gate_up = ups[0] if len(ups) == 1 else torch.cat(ups, 1)
        return deinterleaved(gate_up, 1) if self.facts.interleaved else gate_up, down, None, None

    def _stack(self, matrix: Matrix, get: Named) -> Tensor:
        stack = matrix.stack(get)
        stack = stack[: self.num_experts] if stack.shape[0] > self.num_experts else stack
        return stack.transpose(1, 2) if matrix.transposed else stack

    def recipes(self, path: str, get: Named) -> dict[str, Recipe]:
        """Recipes of the stacked weights of a list of children, by the role that `stacked` gives them."""

        def source(name: str) -> Recipe:
            tensor = get(name)
            return Source(f"{path}.{name}" if path else name, tuple(tensor.shape), tensor.dtype)

        def stack(columns: Sequence[tuple[str, ...]], is_up: bool) -> Recipe:
            rows = Concat(tuple(source(name) for row in zip(*columns, strict=True) for name in row), 0)
            shape = (self.num_experts, rows.shape[0] // self.num_experts, *rows.shape[1:])
            if not is_up or not self.facts.interleaved:
                return Reshape(rows, shape)
            pairs = (shape[0], shape[1] // 2, 2, *shape[2:])
            return Reshape(Transpose(Reshape(rows, pairs), 1, 2), shape)

        made = {"gate_up": stack([m.names for m in self.up], True), "down": stack([self.down.names], False)}
        if self.up[0].biases:
            made["gate_up_bias"] = stack([m.biases for m in self.up], True)
        if self.down.biases:
            made["down_bias"] = stack([self.down.biases], False)
        return made


def expert_weights(module: nn.Module) -> Iterator[ExpertWeights]:
    """Every reading of a module's own lists of children and stacked parameters as experts."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict) and _are_alike(list(child.children())):
            yield from _of_children(name, list(child.named_children()))
    yield from _of_stacks(module)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear` by blocks of rows: torch copies a probe's weight, whose rows overlap, and small copies are fast."""
    if weight.numel() <= BLOCK:
        return F.linear(x, weight, bias)
    result = torch.cat([F.linear(x, rows) for rows in weight.split(max(1, BLOCK // weight.shape[1]))], -1)
    return result if bias is None else result + bias


def _are_alike(children: Sequence[nn.Module]) -> bool:
    """Two or more modules of one class and size, each of two or three matrices with or without biases."""
    forms = {(type(c), tuple((name, p.shape) for name, p in c.named_parameters())) for c in children}
    shapes = [p.dim() for p in children[0].parameters()] if children else []
    return len(children) > 1 and len(forms) == 1 and shapes.count(2) in (2, 3) and set(shapes) <= {1, 2}


def _of_children(container: str, children: Sequence[tuple[str, nn.Module]]) -> Iterator[ExpertWeights]:
    child = with_random_weights(children[0][1], torch.float32)
    parameters = dict(child.named_parameters())
    matrices = []
    for name, parameter in parameters.items():
        if parameter.dim() == 2:
            bias = f"{name.rpartition('.')[0]}.bias".removeprefix(".")
            biases = tuple(f"{container}.{key}.{bias}" for key, _ in children) if bias in parameters else ()
            names = tuple(f"{container}.{key}.{name}" for key, _ in children)
            matrices.append(Matrix(names, biases, *parameter.shape))

    def get(name: str) -> Tensor:
        return parameters[name.removeprefix(f"{container}.{children[0][0]}.")].detach()

    for reading in _readings(container, len(children), matrices):
        x = torch.randn(3, reading.hidden, generator=torch.Generator().manual_seed(2)) * 2
        try:
            with torch.no_grad():
                result = child(x)
        except Exception:
            continue  # it wants another width, or more than a token
        if _is_close(reading.run(get, 0, x), result):
            yield reading
            return


def _is_close(mine: Tensor, theirs: object) -> bool:
    if not isinstance(theirs, Tensor) or theirs.shape != mine.shape:
        return False
    return bool((mine - theirs).abs().max() <= 1e-5 * theirs.abs().max()) and bool(theirs.abs().max() > 0)


def _of_stacks(module: nn.Module) -> Iterator[ExpertWeights]:
    """Readings of two or three stacked parameters: `[E, a, b]`, or `[E·a, b]` where the module knows E or a."""
    named = [
        (f"{path}.{name}".removeprefix("."), parameter)
        for path, owner in (("", module), *module.named_children())
        if not isinstance(owner, _PLAIN)
        for name, parameter in owner.named_parameters(recurse=False)
    ]
    deep = [(name, p) for name, p in named if p.dim() == 3]
    if len(deep) in (2, 3):
        counts = [p.shape[0] for _, p in deep]
        yield from _readings("", min(counts), [Matrix((name,), (), *p.shape[1:]) for name, p in deep])
    flat = [(name, p) for name, p in named if p.dim() == 2]
    if not deep and len(flat) == 3 and len({p.shape for _, p in flat}) == 1:
        rows, columns = flat[0][1].shape
        for count in _counts((module, *module.children()), rows):
            yield from _readings("", count, [Matrix((name,), (), rows // count, columns) for name, _ in flat])


def _counts(modules: Sequence[nn.Module], rows: int) -> list[int]:
    """Numbers that modules know and that divide the rows; first those that are called a number of experts."""
    known: dict[int, bool] = {}
    for name, value in (item for module in modules for item in vars(module).items()):
        if isinstance(value, int) and 1 < value < rows and rows % value == 0:
            known[value] = known.get(value, False) or "expert" in name
    return sorted(known, key=lambda value: (not known[value], value))


def _readings(container: str, num_experts: int, matrices: Sequence[Matrix]) -> Iterator[ExpertWeights]:
    """Every assignment of matrices to gate, up and down that their shapes allow, the usual ones first."""
    for activation, order in itertools.product(ACTIVATIONS, itertools.permutations(matrices)):
        for turns in itertools.product((False, True), repeat=len(order)):
            *up, down = (
                Matrix(m.names, m.biases, m.rows, m.columns, turned) for m, turned in zip(order, turns, strict=True)
            )
            if container and any(turns):
                continue  # children are products of their own, whose weights say which way they go
            fits = all(m.inputs == down.outputs and m.outputs == up[0].outputs for m in up)
            fits = fits and len({bool(m.biases) for m in up}) == 1
            for facts in _facts(activation, len(up), up[0].outputs, down.inputs) if fits else ():
                yield ExpertWeights(container, num_experts, facts, tuple(up), down)


def _facts(activation: str, num_ups: int, up_outputs: int, down_inputs: int) -> Iterator[GateFacts]:
    if num_ups == 2 and up_outputs == down_inputs:
        yield GateFacts(activation, True)
    if num_ups == 1 and up_outputs == down_inputs:
        yield GateFacts(activation, False)
    if num_ups == 1 and up_outputs == 2 * down_inputs:
        yield GateFacts(activation, True)
        yield GateFacts(activation, True, interleaved=True)
