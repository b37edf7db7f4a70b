"""InsertCachedOps: every token mixer becomes its twin over state, knowing no op by name.

The twin's parameters bind by name: those of the op itself keep their arguments, those in `BATCH_INPUTS` become inputs
shared by the whole graph, and those that the op's `states` function names become one new state input each.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from autodeploy.graph.model_graph import ATTENTION, CONVOLUTION, RECURRENCE, ModelGraph, module_path
from autodeploy.graph.transform import Transform, TransformResult
from autodeploy.ops.batch_inputs import BATCH_INPUTS, BatchInput
from autodeploy.ops.op import Op
from autodeploy.ops.state import PagedState, StateSpec

_EXAMPLE_SIZES = {"S": 6, "S+1": 7, "P": 11, "R": 5}
"""sizes of example inputs; all dimensions are symbolic, so only 0 and 1 would be special"""


@dataclass(frozen=True, kw_only=True)
class InsertCachedOps(Transform):
    """`attention(q, k, v, ...)`  becomes  `cached_attention(q, k, v, ..., seq_lens, page_table, ..., key_cache)`.

    Expected are as many sites as the model itself wrote states to its cache, if it has one; what an indexer writes is
    remembered by the attention it serves.
    """

    # Token by token a recurrence adds up in another order than in chunks, and a norm behind it may enlarge that.
    tolerance: ClassVar[Mapping[torch.dtype, float]] = {**Transform.tolerance, torch.float32: 1e-4}

    def apply(self, graph: ModelGraph) -> TransformResult:
        sites = [(node, op) for node, op in graph.op_nodes() if op.states is not None]
        for node, op in sites:
            self._rewrite(graph, node, op)
        written = graph.writes(ATTENTION, CONVOLUTION, RECURRENCE)
        return TransformResult(found=len(sites), rewritten=len(sites), expected=max(len(sites), written))

    def _rewrite(self, graph: ModelGraph, node: fx.Node, op: Op) -> None:
        assert op.states is not None and op.cached is not None
        arguments = op.arguments(node.args, node.kwargs)
        values = fx.map_arg(arguments, lambda argument: argument.meta["val"])
        states = _named(graph, module_path(node) or op.name, op.states(**values))
        graph.states.extend(states.values())
        groups = {spec.group for spec in states.values() if isinstance(spec, PagedState)}
        bound = []
        for parameter in op.cached.parameters:
            if parameter in arguments:
                bound.append(arguments[parameter])
            elif parameter in states:
                bound.append(_state_input(graph, states[parameter]))
            else:
                bound.append(batch_input(graph, parameter, groups))
        node.replace_all_uses_with(graph.call(op.cached, *bound, before=node, like=node))


def batch_input(graph: ModelGraph, name: str, groups: set[str] = frozenset()) -> fx.Node:  # type: ignore[assignment]
    """The placeholder of a batch input, added on first use. Per-group inputs take the one group given."""
    declared = BATCH_INPUTS.get(name)
    if declared is None:
        declared = BATCH_INPUTS[name + "_{group}"]
        (group,) = groups
        name = f"{name}_{group}"
    existing = graph.input(name)
    return existing or graph.add_input(name, _example(graph, declared), before_states=True)


def _example(graph: ModelGraph, declared: BatchInput) -> Tensor:
    """A fake tensor of a batch input's dtype with symbolic sizes; T is the T of `input_ids`."""
    input_ids = graph.input("input_ids")
    assert input_ids is not None
    if "T" in declared.dims:
        with graph.fake_mode:
            tokens = input_ids.meta["val"].shape[1]
            return torch.empty([tokens if dim == "T" else int(dim) for dim in declared.dims], dtype=declared.dtype)
    sizes = [_EXAMPLE_SIZES[dim] if isinstance(dim, str) else dim for dim in declared.dims]
    return symbolic(graph, sizes, declared.dtype, dynamic=len(sizes))


def symbolic(graph: ModelGraph, sizes: list[int], dtype: torch.dtype, *, dynamic: int) -> Tensor:
    """A fake CPU tensor of these example sizes, the first `dynamic` of which are symbolic."""
    # slow to import, and a graph that was kept does without
    from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

    dims = [DimDynamic.DYNAMIC] * dynamic + [DimDynamic.STATIC] * (len(sizes) - dynamic)
    context: StatelessSymbolicContext[Any, Any] = StatelessSymbolicContext(dynamic_sizes=dims)
    return graph.fake_mode.from_tensor(torch.empty(sizes, dtype=dtype), symbolic_context=context)


def _state_input(graph: ModelGraph, spec: StateSpec) -> fx.Node:
    """The placeholder of a state; states that differ in name alone have one number of pages or slots."""
    for other in graph.states:
        existing = graph.input(other.name)
        if existing is not None and dataclasses.replace(other, name=spec.name) == spec:
            with graph.fake_mode:  # a tensor of its own: a compiler takes one object for one memory
                return graph.add_input(spec.name, torch.empty_like(existing.meta["val"]))
    leading = [3, 5] if isinstance(spec, PagedState) else [3]
    return graph.add_input(spec.name, symbolic(graph, [*leading, *spec.shape], spec.dtype, dynamic=len(leading)))


def _named(graph: ModelGraph, path: str, states: dict[str, StateSpec]) -> dict[str, StateSpec]:
    """The specs with names of their own in this graph: the module's path, a number if it has several, the state."""
    taken = {spec.name for spec in graph.states}
    path = path.replace(".", "_")
    prefix, number = path, 1
    while any(f"{prefix}_{name}" in taken for name in states):
        number += 1
        prefix = f"{path}_{number}"
    return {name: dataclasses.replace(spec, name=f"{prefix}_{name}") for name, spec in states.items()}
