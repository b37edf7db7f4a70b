"""ModelGraph: one traced graph, the recipes of its weights and the specs of its states, from capture to lowering."""

import functools
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode

from autodeploy.checkpoint.recipe import Recipe
from autodeploy.errors import TransformError
from autodeploy.graph.fake_values import FakeValues
from autodeploy.graph.levels import Level
from autodeploy.ops.op import Op, find_op
from autodeploy.ops.state import StateSpec

ATTENTION, INDEXER, CONVOLUTION, RECURRENCE = "attention", "indexer", "convolution", "recurrence"
"""Kinds of state that a model writes to its Hugging Face cache."""
BRANCH = "branch"
"""Where a node keeps the number of the branch that it is of, if it may run beside what follows the branch."""


@dataclass
class ModelGraph:
    """A graph and everything that must change with it.

    Attributes:
        name: the graph's name in its program, e.g. `text`.
        module: the graph as an FX module; every node that yields a value carries a fake one in `meta["val"]`.
        mode: the mode those fake values belong to; None for a graph restored from files, which is not changed further.
        weights: attribute name -> recipe, for every parameter; read at the end, once.
        level: what is true of the graph at this point (see `levels.py`).
        states: specs of the states its cached ops read, each also an input of that name.
        max_length: longest sequence in tokens that the traced code allows, or None.
        state_writes: how often the model wrote to its Hugging Face cache while it was traced, by kind (`attention`,
            `indexer`, `convolution`, `recurrence`), or None if it has none.
        repetition: how many layers were written out from others when it was captured, and why not more.
    """

    name: str
    module: fx.GraphModule
    mode: FakeTensorMode | None
    weights: dict[str, Recipe]
    level: Level = Level.CAPTURED
    states: list[StateSpec] = field(default_factory=list)
    max_length: int | None = None
    state_writes: dict[str, int] | None = None
    repetition: str = ""

    def writes(self, *kinds: str) -> int:
        """How often the model wrote state of these kinds while it was traced; of any kind when none is given."""
        writes = self.state_writes or {}
        return sum(count for kind, count in writes.items() if not kinds or kind in kinds)

    @property
    def fake_mode(self) -> FakeTensorMode:
        """The mode in which fake values are computed. Raises TransformError for a restored graph."""
        if self.mode is None:
            raise TransformError(
                f"graph {self.name!r} was restored from files and cannot be transformed; capture it anew"
            )
        return self.mode

    @functools.cached_property
    def fake_values(self) -> FakeValues:
        """What calls give, for the calls that transforms insert."""
        return FakeValues(self.fake_mode)

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    def nodes(self, kind: Op | Callable[..., Any]) -> list[fx.Node]:
        """All nodes that call an op (of ours, or an ATen overload), in order."""
        target = kind.overload if isinstance(kind, Op) else kind
        return self.graph.find_nodes(op="call_function", target=target)

    def op_nodes(self) -> Iterator[tuple[fx.Node, Op]]:
        """All nodes that call an op of ours."""
        for node in self.graph.nodes:
            found = find_op(node.target) if node.op == "call_function" else None
            if found is not None:
                yield node, found

    def providers(self) -> dict[str, dict[str, int]]:
        """Op name -> provider -> number of nodes, of ops that have a provider by now."""
        counts: dict[str, dict[str, int]] = {}
        for node, op in self.op_nodes():
            provider = node.meta.get("provider")
            if provider is not None:
                of_op = counts.setdefault(op.name, {})
                of_op[provider] = of_op.get(provider, 0) + 1
        return counts

    def inputs(self) -> list[fx.Node]:
        """The placeholders, in order."""
        return self.graph.find_nodes(op="placeholder")

    def batch_inputs(self) -> tuple[str, ...]:
        """Names of the inputs that are no states, in order."""
        states = {spec.name for spec in self.states}
        return tuple(str(node.target) for node in self.inputs() if node.target not in states)

    def input(self, name: str) -> fx.Node | None:
        """The placeholder of that name."""
        return next((node for node in self.inputs() if node.target == name), None)

    def add_input(self, name: str, value: torch.Tensor, *, before_states: bool = False) -> fx.Node:
        """A new placeholder after the existing ones, or after those that are no states.

        Args:
            name: the input's name.
            value: a fake tensor of its shape and dtype.
            before_states: keep batch inputs ahead of states.
        """
        states = {spec.name for spec in self.states} if before_states else set()
        last = [node for node in self.inputs() if node.target not in states][-1]
        with self.graph.inserting_after(last):
            node = self.graph.create_node("placeholder", name, name=name)
        node.meta["val"] = value
        return node

    def call(
        self,
        target: Op | Callable[..., Any],
        *args: Any,
        before: fx.Node,
        like: fx.Node | None = None,
        kwargs: Mapping[str, Any] | None = None,
    ) -> fx.Node:
        """Insert a call before a node, with its fake value computed. `like` lends its source location."""
        function = target.overload if isinstance(target, Op) else target
        with self.graph.inserting_before(before):
            name = target.name if isinstance(target, Op) else None
            node = self.graph.create_node("call_function", function, args, dict(kwargs or {}), name=name)
        source = like or before
        for key in ("stack_trace", "nn_module_stack"):
            if key in source.meta:
                node.meta[key] = source.meta[key]
        values = fx.map_arg((args, node.kwargs), lambda argument: argument.meta["val"])
        node.meta["val"] = self.fake_values.of(function, *values)
        return node

    def item(self, node: fx.Node, index: int, *, before: fx.Node) -> fx.Node:
        """`node[index]` of a node that yields a tuple."""
        return self.call(operator.getitem, node, index, before=before, like=node)

    def weight(self, name: str, recipe: Recipe, *, before: fx.Node) -> fx.Node:
        """A node for a weight made by a new recipe; the name is made unique."""
        unique, number = name, 1
        while unique in self.weights:
            unique, number = f"{name}_{number}", number + 1
        self.weights[unique] = recipe
        self.module.register_parameter(unique, _placeholder_parameter(recipe))
        with self.graph.inserting_before(before):
            node = self.graph.get_attr(unique)
        node.meta["val"] = self.fake_values.empty(recipe.shape, recipe.dtype)
        return node

    def constant(self, name: str, value: torch.Tensor, *, before: fx.Node) -> fx.Node:
        """A node for a tensor known now, stored with the graph; the name is made unique."""
        unique, number = name, 1
        while hasattr(self.module, unique):
            unique, number = f"{name}_{number}", number + 1
        self.module.register_buffer(unique, value, persistent=False)
        with self.graph.inserting_before(before):
            node = self.graph.get_attr(unique)
        node.meta["val"] = self.fake_mode.from_tensor(value)
        return node

    def recipe(self, node: object) -> Recipe | None:
        """The recipe behind a node that reads a weight; None for any other node."""
        if isinstance(node, fx.Node) and node.op == "get_attr":
            return self.weights.get(str(node.target))
        return None

    def clean(self) -> None:
        """Drop dead code and weights nobody reads, check the form. Code is generated when kernels are bound."""
        self.graph.eliminate_dead_code(is_impure_node=_is_kept)  # which checks the form first
        used = {str(node.target) for node in self.graph.find_nodes(op="get_attr")}
        for name in [name for name in self.weights if name not in used]:
            del self.weights[name]
        self.module.delete_all_unused_submodules()
        for name in [name for name, _ in self.module.named_parameters() if name not in used]:
            delattr(self.module, name)
        for name in [name for name, _ in self.module.named_buffers() if name not in used]:
            delattr(self.module, name)


def _placeholder_parameter(recipe: Recipe) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.empty(recipe.shape, dtype=recipe.dtype, device="meta"), requires_grad=False)


def _is_kept(node: fx.Node) -> bool:
    """Dead-code elimination keeps inputs, the output and whatever updates a tensor; everything else is pure here."""
    updates = isinstance(node.target, OpOverload) and node.target._schema.is_mutable
    return node.op in ("placeholder", "output") or updates


def module_path(node: fx.Node) -> str:
    """The path of the module whose forward made this node, e.g. `model.layers.3.self_attn`; "" at the top."""
    stack = node.meta.get("nn_module_stack") or {}
    path = next(reversed(stack.values()))[0] if stack else ""
    return str(path).removeprefix("model").removeprefix(".")  # the traced wrapper holds the model as `model`


def source_line(node: fx.Node) -> str:
    """Where in the model's source a node comes from: `file:line code`, its innermost frame outside torch and hooks."""
    lines = [line.strip() for line in (node.meta.get("stack_trace") or "").strip().splitlines()]
    frames = [" ".join(lines[i : i + 2]) for i, line in enumerate(lines) if line.startswith("File ")]
    own = [frame for frame in frames if "/torch/" not in frame and "/autodeploy/capture/" not in frame]
    return (own or frames or ["unknown source"])[-1]
