"""The traced runs of loops over tokens: read from a graph's tags, brought into a form in which they can be compared."""

import torch
from torch import fx

from autodeploy.graph.model_graph import ModelGraph
from autodeploy.ops.captured import NUM_RUNS

aten = torch.ops.aten

_VALUE_FREE = {
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.empty_like.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
    aten.new_empty.default,
    aten.sym_size.int,
}
"""ops that read no value of their argument"""


class Refused(Exception):
    """Why a loop is left alone; completes the sentence `the loop over tokens at ... `."""


def runs_of(graph: ModelGraph) -> list[list[list[fx.Node]]]:
    """For each loop, the nodes of each traced run in order, tensor copies simplified and dead nodes gone."""
    tagged = [node for node in graph.graph.nodes if "run" in node.meta]
    if not tagged:
        return []
    for node in tagged:
        if node.target == aten.copy.default:
            node.replace_all_uses_with(_copied(graph, node))
    graph.clean()
    loops: dict[int, list[list[fx.Node]]] = {}
    for node in graph.graph.nodes:
        if "run" in node.meta:
            loop, run = node.meta["run"]
            loops.setdefault(loop, [[] for _ in range(NUM_RUNS)])[run].append(node)
    return list(loops.values())


def _copied(graph: ModelGraph, node: fx.Node) -> fx.Node:
    """`copy(target, value)` is the value with the target's dtype and shape."""
    value = node.args[1]
    assert isinstance(value, fx.Node)
    wanted = node.meta["val"]
    if value.meta["val"].dtype != wanted.dtype:
        value = graph.call(aten.to.dtype, value, wanted.dtype, before=node)
        value.meta["run"] = node.meta["run"]
    if list(value.meta["val"].shape) != list(wanted.shape):
        value = graph.call(aten.expand.default, value, list(wanted.shape), before=node)
        value.meta["run"] = node.meta["run"]
    return value


def is_num_tokens(graph: ModelGraph, size: object) -> bool:
    """True for the row's number of tokens, T."""
    input_ids = graph.input("input_ids")
    return input_ids is not None and str(size) == str(input_ids.meta["val"].shape[1])


def token_index(graph: ModelGraph, node: fx.Node, run: int) -> tuple[fx.Node, int] | None:
    """For `x[.., t, ..]` and `x[.., t:t+1, ..]` of run t, x having T rows: x and the dimension."""
    if node.target not in (aten.select.int, aten.slice.Tensor):
        return None
    source = node.args[0]
    if not isinstance(source, fx.Node) or len(node.args) < 3:
        return None
    dim = int(node.args[1]) % source.meta["val"].dim()  # type: ignore[arg-type]
    wanted = [run] if node.target == aten.select.int else [run, run + 1]
    if list(node.args[2:]) != wanted or not is_num_tokens(graph, source.meta["val"].shape[dim]):
        return None
    return source, dim


def hoist_invariants(graph: ModelGraph, runs: list[list[fx.Node]]) -> list[list[fx.Node]]:
    """Take what every run computes alike, from outside values only, out of the loop: once, before it."""
    keys = [_invariants(graph, run, number) for number, run in enumerate(runs)]
    every = set(keys[1].values())  # in the first run, what comes from the initial values looks the same
    known: dict[str, fx.Node] = {}
    for invariants in keys:
        for node, key in invariants.items():
            if key not in every:
                continue
            if key in known:
                node.replace_all_uses_with(known[key])
            known.setdefault(key, node)
            del node.meta["run"]
    return [[node for node in run if "run" in node.meta] for run in runs]


def _invariants(graph: ModelGraph, run: list[fx.Node], number: int) -> dict[fx.Node, str]:
    """The nodes of a run that depend on outside values only, each with a text that says what it computes."""
    keys: dict[fx.Node, str] = {}
    for node in run:
        parents = node.all_input_nodes
        if parents and all("run" not in p.meta or p in keys for p in parents) and not token_index(graph, node, number):
            args = fx.map_arg((node.args, node.kwargs), lambda parent: keys.get(parent, parent))
            keys[node] = f"{node.target}{args}"
    return keys


def depends_on_tokens(node: fx.Node) -> bool:
    """True when a value of the row's tokens can reach the node."""
    pending, seen = [node], set()
    while pending:
        current = pending.pop()
        if current.op == "placeholder":
            return True
        if current not in seen and current.target not in _VALUE_FREE:
            seen.add(current)
            pending.extend(current.all_input_nodes)
    return False
