"""GraphRun: a graph at any level, its weights and some sequences go in; logits and every node's value come out.

The graph is interpreted node by node and left as it is. Values come back by node name in the order of the sequences'
tokens, however these were packed and split into steps, so that two runs of one graph, or of the graph before and after
a transform, can be compared node by node.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from autodeploy.checkpoint.recipe import ReadTensor, Recipe, evaluate
from autodeploy.debug.packed_run import Span, Step, fresh_states, step_batch
from autodeploy.graph.model_graph import ModelGraph
from autodeploy.ops.op import REFERENCE, find_op

PAGE_SIZE = 4
"""small, so that short sequences have several pages"""

Schedule = list[Step]


def alone(rows: list[Tensor]) -> Schedule:
    """One step for each sequence, which has the row to itself."""
    return [[Span(index, 0, len(row))] for index, row in enumerate(rows)]


def packed(rows: list[Tensor]) -> Schedule:
    """One step for all sequences, each whole."""
    return [[Span(index, 0, len(row)) for index, row in enumerate(rows)]]


def chunks(rows: list[Tensor]) -> Schedule:
    """Steps of up to 2, 5, 8, ... tokens of each sequence, in an order that changes."""
    return _in_steps(rows, lambda index: 2 + 3 * index)


def token_by_token(rows: list[Tensor]) -> Schedule:
    """Steps of one token of each sequence."""
    return _in_steps(rows, lambda index: 1)


def _in_steps(rows: list[Tensor], size: Callable[[int], int]) -> Schedule:
    schedule: Schedule = []
    done = [0] * len(rows)
    while any(done[index] < len(row) for index, row in enumerate(rows)):
        step = []
        for index, row in enumerate(rows):
            end = min(len(row), done[index] + size(index))
            if end > done[index]:
                step.append(Span(index, done[index], end))
            done[index] = end
        schedule.append(step if len(schedule) % 2 == 0 else step[::-1])
    return schedule


@dataclass
class Weights:
    """Final weights by recipe, made when first asked for.

    Attributes:
        read: gives the tensor of a source.
    """

    read: ReadTensor
    _made: dict[tuple[Recipe, torch.device], Tensor] = field(default_factory=dict)

    def get(self, recipe: Recipe, device: torch.device) -> Tensor:
        """The recipe's tensor on a device."""
        key = (recipe, device)
        if key not in self._made:
            self._made[key] = evaluate(recipe, self.read).to(device)
        return self._made[key]


@dataclass(frozen=True)
class GraphRun:
    """What a graph computed for some sequences.

    Attributes:
        logits: `[sum of lengths, V]`, float32 on the CPU, in the order of the sequences.
        values: by node name, what floating-point nodes gave: tokens first, in the order of the sequences; a value
            without tokens as it was in the first step.
    """

    logits: Tensor
    values: dict[str, Tensor]


@torch.inference_mode()
def run_graph(graph: ModelGraph, weights: Weights, rows: list[Tensor], schedule: Schedule) -> GraphRun:
    """Run a graph over fresh states in the steps of a schedule."""
    (input_ids,) = [node for node in graph.inputs() if node.target == "input_ids"]
    device = input_ids.meta["val"].device
    states = fresh_states(graph.states, rows, device, PAGE_SIZE)
    order = {str(input_ids.meta["val"].shape[1]): _TOKENS}
    wanted = graph.input("logits_indices")
    if wanted is not None:
        order[str(wanted.meta["val"].shape[0])] = _ROWS
    collected = _Values(order, rows)
    for step in schedule:
        batch = step_batch(graph.states, rows, step, device, PAGE_SIZE)
        batch["logits_indices"] = batch["logits_indices"].flip(0)  # an order of its own, to see that it is kept
        values = batch | states
        interpreter = _Interpreter(graph, weights, device)
        result = interpreter.run(*[values[str(node.target)] for node in graph.inputs()])
        collected.add(step, interpreter.values, graph)
        collected.add_logits(step, result.reshape(-1, result.shape[-1]), flipped=wanted is not None)
    return GraphRun(collected.logits(), collected.by_name)


def run_function(
    function: Callable[..., Tensor], graph: ModelGraph, rows: list[Tensor], schedule: Schedule, device: torch.device
) -> Tensor:
    """Logits `[sum of lengths, V]` of a compiled graph over fresh states in the steps of a schedule."""
    states = fresh_states(graph.states, rows, device, PAGE_SIZE)
    collected = _Values({}, rows)
    with torch.inference_mode():
        for step in schedule:
            values = step_batch(graph.states, rows, step, device, PAGE_SIZE) | states
            collected.add_logits(step, function(*[values[str(node.target)] for node in graph.inputs()]), flipped=False)
    return collected.logits()


_TOKENS, _ROWS = "tokens", "rows"


class _Interpreter(fx.Interpreter):
    """Runs a graph with weights made from their recipes and ops done by their chosen kernels; keeps every value."""

    def __init__(self, graph: ModelGraph, weights: Weights, device: torch.device):
        super().__init__(graph.module)
        self.recipes, self.weights, self.device = graph.weights, weights, device
        self.values: dict[str, Tensor] = {}

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        recipe = self.recipes.get(str(target))
        return super().get_attr(target, args, kwargs) if recipe is None else self.weights.get(recipe, self.device)

    def run_node(self, n: fx.Node) -> Any:
        op = find_op(n.target) if n.op == "call_function" else None
        provider = n.meta.get("provider", REFERENCE)
        if op is not None and provider != REFERENCE:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            value = op.kernels[provider].function(*args, **kwargs)
        else:
            value = super().run_node(n)
        if n.op == "call_function" and isinstance(value, Tensor) and value.is_floating_point():
            self.values[n.name] = value.clone()
        return value


class _Values:
    """Values of several steps, put together in the order of the sequences' tokens."""

    def __init__(self, order: dict[str, str], rows: list[Tensor]):
        self.order, self.rows = order, rows
        self.starts = [0, *torch.tensor([len(row) for row in rows]).cumsum(0).tolist()]
        self.by_name: dict[str, Tensor] = {}
        self._logits: Tensor | None = None

    def add(self, step: Step, values: dict[str, Tensor], graph: ModelGraph) -> None:
        for node in graph.graph.nodes:
            value = values.get(node.name)
            if value is None:
                continue
            sizes = [str(size) for size in node.meta["val"].shape]
            dims = [dim for dim, size in enumerate(sizes) if size in self.order]
            varying = [size for size in node.meta["val"].shape if isinstance(size, torch.SymInt)]
            if not dims:
                self.by_name.setdefault(node.name, value.float().cpu())
            elif (
                len(dims) == len(varying) == 1
            ):  # left out: token by token, or by block; what is made of it shows the same
                by_token = value.movedim(dims[0], 0)
                self.by_name[node.name] = self._place(
                    step, by_token, self.by_name.get(node.name), flipped=self.order[sizes[dims[0]]] == _ROWS
                )

    def add_logits(self, step: Step, logits: Tensor, *, flipped: bool) -> None:
        self._logits = self._place(step, logits, self._logits, flipped=flipped)

    def logits(self) -> Tensor:
        if self._logits is None:
            raise ValueError("no step was run")
        return self._logits

    def _place(self, step: Step, by_token: Tensor, into: Tensor | None, *, flipped: bool) -> Tensor:
        by_token = (by_token.flip(0) if flipped else by_token).float().cpu()
        if into is None:
            into = torch.full((self.starts[-1], *by_token.shape[1:]), math.nan)
        begin = 0
        for span in step:
            length, target = span.end - span.start, self.starts[span.sequence] + span.start
            into[target : target + length] = by_token[begin : begin + length]
            begin += length
        return into
