"""RollLoops: the traced runs of a loop over tokens become one recurrence, its body written down once."""

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from autodeploy.graph.model_graph import ModelGraph, source_line
from autodeploy.graph.transform import Transform, TransformResult
from autodeploy.ops.captured import NUM_RUNS, captured_stack
from autodeploy.ops.recurrence import Body, recurrence
from autodeploy.transforms.canonicalize.loop_runs import (
    Refused,
    depends_on_tokens,
    hoist_invariants,
    runs_of,
    token_index,
)

aten = torch.ops.aten

_SCATTERS = (aten.select_scatter.default, aten.slice_scatter.default)


@dataclass(frozen=True, kw_only=True)
class RollLoops(Transform):
    """`h_1 = f(h_0, x[0]); h_2 = f(h_1, x[1]); ...`  becomes  `recurrence([x], constants, [h_0], "f")`.

    The first run says what the loop starts from, the second what it carries; the third must be the second again. What
    differs in anything but the token's index, reads the row as a whole, or is used after the loop, is refused.
    """

    def apply(self, graph: ModelGraph) -> TransformResult:
        loops = runs_of(graph)
        refused = []
        for runs in loops:
            place = source_line(next(node for run in runs for node in run))
            try:
                _roll(graph, hoist_invariants(graph, runs))
            except Refused as reason:
                refused.append(f"the loop over tokens at {place} {reason}; write it as an op (docs/adding-an-op.md)")
        return TransformResult(
            found=len(loops), rewritten=len(loops) - len(refused), expected=len(loops), refused=tuple(refused)
        )


@dataclass
class _Parts:
    """What one loop's body reads and gives, found by comparing its runs."""

    tokens: list[tuple[fx.Node, int]] = field(default_factory=list)
    constants: list[fx.Node] = field(default_factory=list)
    carried: list[tuple[int, fx.Node]] = field(default_factory=list)
    """position of the node that makes it, and the node that stands for it in the first run"""
    collected: dict[int, tuple[fx.Node, int]] = field(default_factory=dict)
    """position of a scatter into a tensor of T rows -> the value scattered, and the dimension"""


def _roll(graph: ModelGraph, runs: list[list[fx.Node]]) -> None:
    template = runs[1]
    position = {node: index for run in runs[:2] for index, node in enumerate(run)}
    parts = _compare(graph, runs, position)
    position |= _align(graph, template, runs[2], position)
    outputs = _outputs(runs, position, parts)
    body, values = _body(graph, template, position, parts, [value for value, *_ in outputs])
    end = runs[-1][-1].next
    result = _emit(graph, parts, body, runs, before=end)
    start = 0
    for (value, users, dim, adds_dim), _ in zip(outputs, values, strict=True):
        shape = list(value.meta["val"].shape)
        size = value.meta["val"].numel()
        rows = _rows(graph, result, start, size, shape, dim, adds_dim, before=end)
        start += size
        for user in users:
            user.replace_all_uses_with(rows)
            user.meta.pop("run", None)


def _compare(graph: ModelGraph, runs: list[list[fx.Node]], position: dict[fx.Node, int]) -> _Parts:
    """Walk the first two runs side by side."""
    first, second = runs[0], runs[1]
    if not all(runs):
        raise Refused("does other things in some steps than in others, or looks further back than one step")
    if [node.target for node in first] != [node.target for node in second]:
        raise Refused("does other things in its first step than in its second, or looks further back than one step")
    parts = _Parts()
    own, before = set(second), set(first)
    for index, (one, two) in enumerate(zip(first, second, strict=True)):
        token = token_index(graph, two, 1)
        if token is not None and token == token_index(graph, one, 0) and token[0] not in own | before:
            if token not in parts.tokens:
                parts.tokens.append(token)
            continue
        if two.target in _SCATTERS and _is_collecting(two, one, index, position):
            parts.collected[index] = (two.args[1], two.args[2])  # type: ignore[assignment]
            _check_value(one.args[1], two.args[1], own, before, position)
            continue
        for a, b in _pairs(one, two):
            _classify(a, b, own, before, position, parts)
    return parts


def _is_collecting(two: fx.Node, one: fx.Node, index: int, position: dict[fx.Node, int]) -> bool:
    """`rows[:, t] = value`: into what the same place of the previous run made, at this run's token."""
    place = [(0, 1), (1, 2)] if two.target == aten.slice_scatter.default else [0, 1]
    found = [node.args[3:5] if isinstance(place[0], tuple) else node.args[3] for node in (one, two)]
    alone = all(user.target in _SCATTERS for user in one.users)
    return found == place and position.get(two.args[0]) == index and two.args[0] is one and alone  # type: ignore[arg-type]


def _check_value(a: Any, b: Any, own: set[fx.Node], before: set[fx.Node], position: dict[fx.Node, int]) -> None:
    if b not in own or position[a] != position[b]:
        raise Refused("collects a value that its steps do not make")


def _pairs(one: fx.Node, two: fx.Node) -> Iterator[tuple[Any, Any]]:
    """Arguments of both nodes at the same places, lists entered."""

    def walk(a: Any, b: Any) -> Iterator[tuple[Any, Any]]:
        if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
            for left, right in zip(a, b, strict=True):
                yield from walk(left, right)
        else:
            yield a, b

    yield from walk(one.args, two.args)
    yield from walk([one.kwargs[key] for key in sorted(one.kwargs)], [two.kwargs[key] for key in sorted(two.kwargs)])


def _classify(
    a: Any, b: Any, own: set[fx.Node], before: set[fx.Node], position: dict[fx.Node, int], parts: _Parts
) -> None:
    """One argument of the first run and its counterpart of the second: made here, carried, constant, or refused."""
    if not isinstance(b, fx.Node):
        if a != b:
            raise Refused(f"uses another value ({a!r}, then {b!r}) in each step")
    elif b in own:
        if a not in before or position[a] != position[b]:
            raise Refused("uses other intermediate values in its first step than in its second")
    elif b in before:
        if not isinstance(a, fx.Node) or a in before:
            raise Refused("looks further back than one step")
        if (position[b], a) not in parts.carried:
            parts.carried.append((position[b], a))
    elif a is not b:
        raise Refused("reads other values in its first step than in its second, or looks further back than one step")
    elif b not in parts.constants:
        parts.constants.append(b)


def _align(
    graph: ModelGraph, template: list[fx.Node], last: list[fx.Node], position: dict[fx.Node, int]
) -> dict[fx.Node, int]:
    """Where each node of the last run stands in the template; what only a later run would use may be missing."""
    found: dict[fx.Node, int] = {}
    start = 0
    for node in last:
        for index in range(start, len(template)):
            if _same_step(graph, template[index], node, position, found):
                found[node], start = index, index + 1
                break
        else:
            raise Refused("does other things in its third step than in its second, or looks further back than one step")
    return found


def _same_step(
    graph: ModelGraph, one: fx.Node, two: fx.Node, position: dict[fx.Node, int], found: dict[fx.Node, int]
) -> bool:
    if one.target != two.target:
        return False
    tokens = token_index(graph, one, 1), token_index(graph, two, 2)
    if tokens[0] is not None:
        return tokens[0] == tokens[1]
    pairs = list(_pairs(one, two))
    if one.target in _SCATTERS:
        pairs = pairs[:3]

    def same(a: Any, b: Any) -> bool:
        if not isinstance(a, fx.Node) or not isinstance(b, fx.Node):
            return bool(a == b)
        run_a, run_b = a.meta.get("run"), b.meta.get("run")
        if run_a is None or run_b is None:
            return a is b
        return (position[a], run_a[1] + 1) == (found.get(b, position.get(b)), run_b[1])

    return all(same(a, b) for a, b in pairs)


def _outputs(
    runs: list[list[fx.Node]], position: dict[fx.Node, int], parts: _Parts
) -> list[tuple[fx.Node, list[fx.Node], int, bool]]:
    """What is used after the loop: the template's value, what to replace, the tokens' dimension, is it new?"""
    found: list[tuple[fx.Node, list[fx.Node], int, bool]] = []
    inside = {node for run in runs for node in run}
    for node in [node for run in runs for node in run]:
        for user in [user for user in node.users if user not in inside]:
            where = position[node]
            if user.target == captured_stack.overload:
                made = [position.get(part) for part in user.args[0]]  # type: ignore[union-attr, arg-type]
                if made != [where] * NUM_RUNS:
                    raise Refused("collects different values in different steps")
                if not any(user in users for _, users, *_ in found):
                    found.append((runs[1][where], [user], user.args[1], user.args[2]))  # type: ignore[arg-type]
            elif where in parts.collected and node in runs[-1]:
                if not any(node in users for _, users, *_ in found):
                    value, dim = parts.collected[where]
                    found.append((value, [node], dim, node.target == aten.select_scatter.default))
            else:
                raise Refused("is read after it has ended, other than the values of all tokens")
    if not found:
        raise Refused("gives nothing out")
    if len({value.meta["val"].dtype for value, *_ in found}) > 1:
        raise Refused("gives out values of several dtypes")
    return found


def _body(
    graph: ModelGraph, template: list[fx.Node], position: dict[fx.Node, int], parts: _Parts, outputs: list[fx.Node]
) -> tuple[Body, list[Any]]:
    """The template as text: calls by number, everything read by kind and number."""
    calls: list[tuple[str, Any, Any]] = []
    refs: dict[fx.Node, Any] = {node: ["c", index] for index, node in enumerate(parts.constants)}
    made: dict[int, Any] = {}
    slots = {where: index for index, (where, _) in reversed(list(enumerate(parts.carried)))}

    def encode(value: Any) -> Any:
        if isinstance(value, fx.Node):
            if value in refs:
                return refs[value]
            return ["h", slots[position[value]]]
        if value is None or isinstance(value, bool | int | float | str):
            return value
        if isinstance(value, list | tuple):
            return {"list": [encode(part) for part in value]}
        if isinstance(value, torch.dtype | torch.layout | torch.memory_format):
            return {"torch": str(value).removeprefix("torch.")}
        if isinstance(value, torch.device):
            return {"device": "tokens"}
        raise Refused(f"uses a value of type {type(value).__name__} that cannot be written down")

    _check_carries(parts, template)
    for index, node in enumerate(template):
        token = token_index(graph, node, 1)
        if token is not None:
            ref: Any = ["x", parts.tokens.index(token)]
            if node.target == aten.slice.Tensor:
                calls.append(("aten.unsqueeze.default", [ref, token[1]], {}))
                ref = ["n", len(calls) - 1]
        elif index in parts.collected:
            continue
        else:
            name = _operator_name(node)
            args = [encode(argument) for argument in node.args]
            calls.append((name, args, {key: encode(value) for key, value in node.kwargs.items()}))
            ref = ["n", len(calls) - 1]
        refs[node] = made[index] = ref
    values = [refs[node] for node in outputs]
    return Body(tuple(calls), tuple(made[where] for where, _ in parts.carried), tuple(values)), values


def _operator_name(node: fx.Node) -> str:
    if node.target == operator.getitem:
        return "getitem"
    if not isinstance(node.target, OpOverload):
        raise Refused(f"calls {node.target}, which is no operator of torch")
    return f"{node.target._schema.name.replace('::', '.')}.{node.target._overloadname}"


def _check_carries(parts: _Parts, template: list[fx.Node]) -> None:
    places = [where for where, _ in parts.carried]
    if len(set(places)) != len(places):
        raise Refused("starts one carried value from two different ones")
    for where, start in parts.carried:
        value = template[where].meta["val"]
        if any(isinstance(size, torch.SymInt) for size in value.shape):
            raise Refused("carries a tensor whose size depends on the row")
        if value.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise Refused(f"carries a tensor of {value.dtype}")
        if depends_on_tokens(start):
            raise Refused("starts from a value of the row's own tokens")
    for node in parts.constants:
        value = node.meta["val"]
        if not isinstance(value, torch.Tensor) or any(isinstance(size, torch.SymInt) for size in value.shape):
            raise Refused("reads the whole row, or its length, in every step")


def _emit(graph: ModelGraph, parts: _Parts, body: Body, runs: list[list[fx.Node]], before: fx.Node) -> fx.Node:
    """Insert the recurrence; token tensors become `[1, T, *shape]`, initial values get the carried shape and dtype."""
    like = runs[1][0]
    tokens = []
    for node, dim in parts.tokens:
        order = [dim, *(d for d in range(node.meta["val"].dim()) if d != dim)]
        moved = graph.call(aten.permute.default, node, order, before=before, like=like)
        tokens.append(graph.call(aten.unsqueeze.default, moved, 0, before=before, like=like))
    initial = []
    for where, start in parts.carried:
        wanted, value = runs[1][where].meta["val"], start.meta["val"]
        if value.dtype != wanted.dtype:
            start = graph.call(aten.to.dtype, start, wanted.dtype, before=before, like=like)
        if list(value.shape) != list(wanted.shape):
            start = graph.call(aten.expand.default, start, list(wanted.shape), before=before, like=like)
        initial.append(start)
    boundaries = graph.input("cu_seqlens")
    return graph.call(recurrence, tokens, parts.constants, initial, body.text(), boundaries, before=before, like=like)


def _rows(
    graph: ModelGraph,
    result: fx.Node,
    start: int,
    size: int,
    shape: list[int],
    dim: int,
    adds_dim: bool,
    before: fx.Node,
) -> fx.Node:
    """One output of all tokens, cut from the flat result `[1, T, F]` and brought into the shape the loop collected."""
    rank = len(shape) + 1
    dim = dim % rank if adds_dim else dim % len(shape)
    cut = graph.call(aten.slice.Tensor, result, 2, start, start + size, before=before, like=result)
    rows = graph.call(aten.reshape.default, cut, [-1, *shape], before=before, like=result)
    order = [*range(1, dim + 1), 0, *range(dim + 1, rank)]
    moved = graph.call(aten.permute.default, rows, order, before=before, like=result)
    if adds_dim:
        return moved
    merged = [*shape[:dim], -1, *shape[dim + 1 :]]
    return graph.call(aten.reshape.default, moved, merged, before=before, like=result)
