"""MatchRecurrences: a rolled loop whose step is that of a named op, by its numbers, becomes calls of that op."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from autodeploy.graph.model_graph import ModelGraph
from autodeploy.graph.transform import Transform, TransformResult
from autodeploy.ops.op import find_op
from autodeploy.ops.recurrence import parse_body, recurrence
from autodeploy.transforms.canonicalize.bounds import bounds
from autodeploy.transforms.canonicalize.evaluate import NotEvaluable, evaluate, is_evaluable
from autodeploy.transforms.canonicalize.loop_step import Form, Step
from autodeploy.transforms.canonicalize.named_recurrence import LEAST, NamedRecurrence, named_recurrence

aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True)
class MatchRecurrences(Transform):
    """`recurrence(tokens, constants, initial, "f")`  becomes  `linear_attention(q, k, v, log(decay))`, and so on.

    The step is run on random numbers beside the step of each named op. What it does for each token alone stays outside,
    for all tokens at once. Named ops hold their states in float32 and run whole chunks of tokens; sums come in another
    order. What is not recognised stays a recurrence, which is right and runs token by token.
    """

    tolerance: ClassVar[Mapping[torch.dtype, float]] = {**Transform.tolerance, torch.float32: 1e-4}

    def apply(self, graph: ModelGraph) -> TransformResult:
        found = graph.nodes(recurrence)
        return TransformResult(found=len(found), rewritten=sum(_rewrite(graph, node) for node in found))


def _rewrite(graph: ModelGraph, node: fx.Node) -> bool:
    tokens, constants, initial, body, cu_seqlens = node.args
    starts = tuple(_uniform(graph, start) for start in initial)  # type: ignore[union-attr, arg-type]
    traced = _traced(str(body), _forms(tokens, 2), _forms(constants, 0), _forms(initial, 0), starts)
    if traced is None:
        return False
    inputs = [cu_seqlens, *tokens, *constants]  # type: ignore[misc]
    outside = dict(zip(traced.find_nodes(op="placeholder"), inputs, strict=True))
    decays = [n.args[0] for n in traced.nodes if n.target == aten.clamp_min.default and n.args[1] == LEAST]
    if any(bounds(decay, outside)[0] < 0 for decay in decays):
        return False
    node.replace_all_uses_with(_copied(graph, traced, inputs, node))
    return True


def _copied(graph: ModelGraph, traced: fx.Graph, inputs: Sequence[Any], before: fx.Node) -> fx.Node:
    """The traced nodes in the graph, before a node; what they give. They were traced for contiguous inputs."""
    copies: dict[fx.Node, fx.Node] = {}
    for place, value in zip(traced.find_nodes(op="placeholder"), inputs, strict=True):
        is_read = bool(place.users) and value.op != "placeholder"
        copies[place] = graph.call(aten.contiguous.default, value, before=before) if is_read else value
    for node in traced.nodes:
        if node.op == "call_function":
            args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), copies.__getitem__)
            copies[node] = graph.call(find_op(node.target) or node.target, *args, before=before, kwargs=kwargs)
    (result,) = traced.output_node().args
    return copies[result]  # type: ignore[index]


def _forms(nodes: Any, skipped: int) -> tuple[Form, ...]:
    values = [node.meta["val"] for node in nodes]
    return tuple((tuple(value.shape[skipped:]), value.dtype) for value in values)


def _uniform(graph: ModelGraph, start: fx.Node) -> float | None:
    """The number that a carried value starts from everywhere, or None."""
    try:
        value = evaluate(graph, start, 3).flatten() if is_evaluable(graph, start) else torch.empty(0)
    except NotEvaluable:
        return None
    return float(value[0]) if value.numel() and bool((value == value[0]).all()) else None


@functools.lru_cache(maxsize=256)
def _traced(
    body: str,
    tokens: tuple[Form, ...],
    constants: tuple[Form, ...],
    carried: tuple[Form, ...],
    starts: tuple[float | None, ...],
) -> fx.Graph | None:
    """The calls that stand for a recurrence as a graph of boundaries, tokens and constants; None where no op is known.

    They are traced apart from any model's graph: what fixes the number of tokens is seen, and harms nothing.
    """
    try:
        named = named_recurrence(Step(parse_body(body)), tokens, constants, carried, starts)
        return None if named is None else _trace(named, tokens, constants)
    except Exception:  # the step does not run on numbers of another dtype, on random ones, or for all tokens at once
        return None


def _trace(named: NamedRecurrence, tokens: Sequence[Form], constants: Sequence[Form]) -> fx.Graph | None:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])  # type: ignore[var-annotated]
    row = mode.from_tensor(torch.empty(23), symbolic_context=context)

    def call(cu_seqlens: Tensor, *values: Tensor) -> Tensor:
        return named(values[: len(tokens)], values[len(tokens) :], cu_seqlens)

    with mode:
        fakes = [row.new_empty(1, row.shape[0], *shape, dtype=dtype) for shape, dtype in tokens]
        fakes += [row.new_empty(shape, dtype=dtype) for shape, dtype in constants]
        traced = make_fx(call)(row.new_empty(3, dtype=torch.int32), *fakes).graph
    traced.eliminate_dead_code()
    length = row.shape[0]
    return traced if isinstance(length, torch.SymInt) and length.node.expr.free_symbols else None
