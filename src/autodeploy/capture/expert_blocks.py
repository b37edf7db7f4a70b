"""Experts outside the interface: a module whose code loops over experts becomes one `moe` node, known by its numbers.

Candidates are modules that hold a list of alike children, or stacked parameters. One is run on random tokens with
random weights and recorded (`tape.py`). If, among the tensors it made, there are choices and weights for which `moe`
gives another tensor it made, then that tensor is the experts' sum, and the loop that made it is replaced; what stands
around it (the router, shared experts, shapes) stays the module's own code. What no numbers confirm stays as it is.
"""

import contextlib
import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from autodeploy.capture.expert_weights import ExpertWeights, Matrix, Named, expert_weights
from autodeploy.capture.random_weights import with_random_weights
from autodeploy.capture.tape import Given, Program, Recording, Reference, Unrepeatable, program
from autodeploy.checkpoint.recipe import Recipe
from autodeploy.ops.moe import moe

LENGTHS = (3, 5)
"""Numbers of tokens of the two recordings."""

CONFIRMING_LENGTH = 4
"""Number of tokens of the run that a replay is compared with."""

CHOICES = 2
"""Experts per token where the probe chooses them."""

_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 4e-2, torch.float16: 1e-2}
"""Difference from the module's own result, as a share of the largest value, that rounding in that dtype may cause."""

_MOST_SUMS = 8

FIRST_CHANNELS = 64
"""Channels by which a sum is looked for; what is found is confirmed on all of them."""

KnownProducts = dict[tuple[Matrix, int], Tensor]
"""What a matrix of an expert gives for all tokens of a run: many readings share it."""

ROLES = ("gate_up", "down", "gate_up_bias", "down_bias")
"""The weights of `moe`, in its order."""


@dataclass(frozen=True)
class Sum:
    """Where a recording has the sum over each token's experts.

    Attributes:
        step: that makes it. indices, weights: what it is made of, besides the tokens.
        passes_on: a choice beyond the last expert stands for the token itself; else for nothing.
    """

    step: int
    indices: Reference
    weights: Reference
    passes_on: bool


@dataclass(frozen=True)
class Block:
    """A recognised module: its experts, and its own code with their sum replaced.

    Attributes:
        is_row: tokens come as `[1, N, H]`, else as `[N, H]`.
    """

    experts: ExpertWeights
    code: Program
    passes_on: bool
    is_row: bool

    def run(self, arguments: Sequence[Tensor], get: Named, mixture: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Any:
        """The module's result; `mixture(x, indices, weights)` is the sum over each token's experts."""

        def total(x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
            x, indices = x.reshape(-1, self.experts.hidden), indices.reshape(-1, indices.shape[-1])
            weights = _of_choices(weights, indices)
            result = mixture(x, indices, weights)
            if self.passes_on:
                beyond = (weights * (indices >= self.experts.num_experts)).sum(-1, keepdim=True)
                result = (result + x * beyond).to(x.dtype)
            return result

        return self.code.run(arguments, get, arguments[0].shape[-2], total)


@contextlib.contextmanager
def expert_blocks_replaced(model: nn.Module) -> Iterator[dict[str, Recipe]]:
    """While open, recognised modules of a model emit canonical ops.

    Yields the recipes, by name in the model, of parameters that stand for the weights of many modules.
    """
    recipes: dict[str, Recipe] = {}
    known: dict[object, Block | None] = {}
    done: list[str] = []
    with contextlib.ExitStack() as stack:
        for path, module in reversed(list(model.named_modules())):  # what is inside comes before what it is in
            is_around = any(not path or inner.startswith(f"{path}.") for inner in done)
            readings = [] if is_around else list(expert_weights(module))
            if not readings:
                continue
            key = _key(module)
            if key not in known:
                known[key] = recognise(module, readings)
            block = known[key]
            if block is not None:
                done.append(path)
                recipes |= stack.enter_context(_replaced(module, path, block))
        yield recipes


def recognise(module: nn.Module, readings: Sequence[ExpertWeights]) -> Block | None:
    """The block that a module computes, if its experts are one of these readings; None if not."""
    dtype = next(parameter.dtype for parameter in module.parameters())
    probes = {wanted: with_random_weights(module, wanted) for wanted in {torch.float32, dtype}}
    for hidden, is_row in itertools.product(sorted({reading.hidden for reading in readings}), (True, False)):
        fitting = [reading for reading in readings if reading.hidden == hidden]
        block = _recognise(probes[torch.float32], fitting, is_row, torch.float32)
        if block is not None and dtype != torch.float32:  # known exactly; the code's own casts are those of its dtype
            block = _recognise(probes[dtype], [block.experts], is_row, dtype)
        if block is not None:
            return block
    return None


def _recognise(probe: nn.Module, readings: Sequence[ExpertWeights], is_row: bool, dtype: torch.dtype) -> Block | None:
    try:
        runs = [
            _arguments(probe, readings[0].hidden, length, is_row, dtype) for length in (*LENGTHS, CONFIRMING_LENGTH)
        ]
        recordings = [Recording(length) for length in LENGTHS]
        for recording, arguments in zip(recordings, runs, strict=False):
            recording.record(probe, arguments)
        with torch.no_grad():
            expected = probe(*runs[-1])
    except Exception:
        return None  # it takes something else than tokens, or tokens and their choices
    get = _getter(probe)
    products: list[KnownProducts] = [{} for _ in recordings]
    for reading in readings:
        sums = [
            list(itertools.islice(_sums(recording, arguments, reading, get, known), _MOST_SUMS))
            for recording, arguments, known in zip(recordings, runs, products, strict=False)
        ]
        for first, second in itertools.product(*sums):
            block = _confirmed(recordings, (first, second), reading, is_row, (runs[-1], get, expected))
            if block is not None:
                return block
    return None


def _arguments(module: nn.Module, hidden: int, length: int, is_row: bool, dtype: torch.dtype) -> list[Tensor]:
    """Random tokens, and where the module wants them, choices and weights of experts.

    Raises:
        TypeError: the module takes something else.
    """
    required = [
        p
        for p in inspect.signature(module.forward).parameters.values()
        if p.default is p.empty and p.kind == p.POSITIONAL_OR_KEYWORD
    ]
    generator = torch.Generator().manual_seed(length)
    x = torch.randn((1, length, hidden) if is_row else (length, hidden), generator=generator).to(dtype)
    if len(required) == 1:
        return [x]
    if len(required) != 3:
        raise TypeError(f"{type(module).__name__} takes {len(required)} arguments")
    most = max((p.shape[0] for p in module.parameters() if p.dim() == 3), default=CHOICES)
    few = torch.tensor(sorted({0, 1, most - 1}))  # each expert that is run is a copy of its weights
    weights, places = torch.rand(length, len(few), generator=generator).topk(min(CHOICES, len(few)))
    return [x, few[places], weights.to(dtype)]


def _sums(
    recording: Recording, arguments: Sequence[Tensor], reading: ExpertWeights, get: Named, known: KnownProducts
) -> Iterator[Sum]:
    """Every place, the latest first, where the recording has what `moe` gives for choices and weights made before."""
    x = arguments[0].reshape(-1, reading.hidden)
    values = [value for value in _values(recording, arguments) if _is_per_token(value.tensor, recording.length)]
    places = [value for value in _values(recording, ()) if value.tensor.numel() == x.numel() and not value.output]
    places = [value for value in places if value.tensor.is_floating_point()]
    first = min(FIRST_CHANNELS, reading.hidden)
    sums = torch.stack([value.tensor.reshape(x.shape)[:, :first].float() for value in places]) if places else x[None]
    for choice in values:
        if choice.tensor.dtype != torch.int64:
            continue
        indices = choice.tensor.reshape(-1, choice.tensor.shape[-1])
        products = _products(x, indices, reading, get, known, first)
        for weight in values:
            chosen = _of_choices(weight.tensor, indices)
            if not chosen.is_floating_point() or chosen.shape != indices.shape:
                continue
            for passes_on, total in _totals(x[:, :first], products, chosen, indices, reading.num_experts):
                close = (sums - total).abs().amax((1, 2)) <= _TOLERANCE.get(x.dtype, 1e-4) * total.abs().max()
                for number in close.nonzero().flatten().tolist() if places else ():
                    if places[number].step > max(choice.step, weight.step):
                        yield Sum(places[number].step, choice.name, weight.name, passes_on)


@dataclass(frozen=True)
class _Value:
    """A tensor as a step left it."""

    step: int
    output: int
    name: Reference
    tensor: Tensor


def _values(recording: Recording, arguments: Sequence[Tensor]) -> Iterator[_Value]:
    """What the steps of a recording made, the latest first, and what the module was given besides tokens."""
    for step, made in reversed(list(enumerate(recording.values))):
        for output, value in enumerate(made):
            if value is not None:
                yield _Value(step, output, recording.made_by(step, output), value)
    yield from (_Value(-1, 0, Given(position), value) for position, value in enumerate(arguments) if position)


def _is_per_token(tensor: Tensor, length: int) -> bool:
    return tensor.dim() in (2, 3) and tensor.shape[-2] == length and tensor.numel() == length * tensor.shape[-1]


def _of_choices(weights: Tensor, indices: Tensor) -> Tensor:
    """Weights `[N, K]` of the choices, from those or from weights of all experts."""
    weights = weights.reshape(-1, weights.shape[-1])
    if weights.shape[-1] != indices.shape[-1] and weights.shape[-1] > indices.shape[-1]:
        return weights.gather(1, indices.clamp(0, weights.shape[-1] - 1))
    return weights


def _products(
    x: Tensor, indices: Tensor, reading: ExpertWeights, get: Named, known: KnownProducts, first: int | None = None
) -> Tensor:
    """The `first` channels of each choice's expert applied to its token, `[N, K, first]`; zeros for no expert.

    Args:
        known: products up for all tokens `x`; those that are needed and missing are added.
    """
    products = x.new_zeros(*indices.shape, first or x.shape[-1])
    for expert in indices.unique().tolist():
        if not 0 <= expert < reading.num_experts:
            continue
        tokens, places = torch.where(indices == expert)
        for matrix in reading.up:
            if (matrix, expert) not in known:
                known[matrix, expert] = matrix.product(get, expert, x)
        ups = [known[matrix, expert][tokens] for matrix in reading.up]
        products[tokens, places] = reading.finish(get, expert, ups, first)
    return products


def _weighted(products: Tensor, weights: Tensor) -> Tensor:
    return (products.float() * weights[..., None].float()).sum(1)


def _totals(
    x: Tensor, products: Tensor, weights: Tensor, indices: Tensor, num_experts: int
) -> Iterator[tuple[bool, Tensor]]:
    total = _weighted(products, weights)
    beyond = (weights * (indices >= num_experts)).float().sum(-1, keepdim=True)
    if bool(beyond.any()):
        yield True, total + x.float() * beyond
    if bool(total.any()):
        yield False, total


def _confirmed(
    recordings: Sequence[Recording],
    sums: tuple[Sum, Sum],
    reading: ExpertWeights,
    is_row: bool,
    run: tuple[Sequence[Tensor], Named, Any],
) -> Block | None:
    """The block, if the module's code around the sums is the same in both recordings and gives its own result."""
    first, second = sums
    if first.passes_on != second.passes_on:
        return None
    arguments, get, expected = run
    needs = tuple((Given(0), total.indices, total.weights) for total in sums)
    try:
        code = program(recordings[0], recordings[1], (first.step, second.step), (needs[0], needs[1]))
        if code.depends_on_values():
            return None  # some of the loop is left
        if code.reads() & {name for matrix in (*reading.up, reading.down) for name in (*matrix.names, *matrix.biases)}:
            return None
        block = Block(reading, code, first.passes_on, is_row)
        with torch.no_grad():
            result = block.run(
                arguments, get, lambda x, i, w: _weighted(_products(x, i, reading, get, {}), w).to(x.dtype)
            )
    except Unrepeatable:
        return None
    return block if _agree(result, expected) else None


def _agree(result: Any, expected: Any) -> bool:
    mine, theirs = ([leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)] for tree in (result, expected))
    return len(mine) == len(theirs) and all(
        a.shape == b.shape and a.dtype == b.dtype and _is_close(a, b) for a, b in zip(mine, theirs, strict=True)
    )


def _is_close(mine: Tensor, theirs: Tensor) -> bool:
    if not mine.is_floating_point():
        return torch.equal(mine, theirs)
    largest = theirs.abs().max()
    return bool((mine - theirs).abs().max() <= _TOLERANCE.get(mine.dtype, 1e-4) * largest)


def _getter(module: nn.Module) -> Named:
    tensors = dict(module.named_parameters(remove_duplicate=False)) | dict(module.named_buffers(remove_duplicate=False))
    return lambda name: tensors[name].detach()


def _key(module: nn.Module) -> object:
    """Modules with equal keys compute the same from their weights."""
    forms = []
    for name, inner in module.named_modules():
        scalars = {k: v for k, v in vars(inner).items() if isinstance(v, bool | int | float | str | None)}
        forms.append((name, type(inner), tuple(sorted(scalars.items(), key=str))))
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return (*forms, *((name, tensor.shape, tensor.dtype) for name, tensor in tensors))


@contextlib.contextmanager
def _replaced(module: nn.Module, path: str, block: Block) -> Iterator[dict[str, Recipe]]:
    """Let a module run as its block; experts that are modules of their own are one stacked parameter each meanwhile."""
    experts = block.experts
    original = module.forward
    container = module._modules.get(experts.container) if experts.container else None
    recipes = experts.recipes(path, _getter(module)) if container is not None else {}
    names = {role: f"{experts.container}_{role}" for role in recipes}
    parameters = {
        names[role]: nn.Parameter(torch.empty(recipe.shape, dtype=recipe.dtype, device="meta"), requires_grad=False)
        for role, recipe in recipes.items()
    }

    def forward(*args: Any, **kwargs: Any) -> Any:
        bound = inspect.signature(original).bind(*args, **kwargs).arguments
        arguments = list(bound.values())
        get = _getter(module)
        if container is None:
            stacked: Sequence[Tensor | None] = experts.stacked(get)
        else:
            stacked = [get(names[role]) if role in names else None for role in ROLES]
        facts = experts.facts
        known = (facts.activation, facts.gated, facts.limit, facts.up_offset)
        return block.run(arguments, get, lambda x, indices, weights: moe(x, indices, weights, *stacked, *known))

    if container is not None:
        module._modules[experts.container] = type(container)()
    for name, parameter in parameters.items():
        module.register_parameter(name, parameter)
    module.forward = forward
    try:
        yield {f"{path}.{names[role]}".removeprefix("."): recipe for role, recipe in recipes.items()}
    finally:
        del module.forward
        for name in parameters:
            del module._parameters[name]
        if container is not None:
            module._modules[experts.container] = container
