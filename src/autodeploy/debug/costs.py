"""What a lowered graph costs: its nodes go in, operations and bytes come out, per token, per key and per step.

Counted is what must be done and moved at the least: each weight once per step, each intermediate value written and
read, each state entry that a token sees read once. Times follow from the rates of a machine, in `roofline`.
"""

import dataclasses
import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from autodeploy.bench.machine import MachineLimits
from autodeploy.checkpoint.load import weight_bytes
from autodeploy.graph.model_graph import ModelGraph
from autodeploy.ops.op import Work, find_op
from autodeploy.ops.quantized_embedding import quantized_embedding
from autodeploy.ops.state import PagedState, SlotState

aten = torch.ops.aten

_VIEWS = {
    operator.getitem,
    aten.reshape.default, aten.view.default, aten.transpose.int, aten.permute.default, aten.t.default,
    aten.unsqueeze.default, aten.squeeze.dim, aten.expand.default, aten.slice.Tensor, aten.select.int,
    aten.split_with_sizes.default, aten.split.Tensor, aten.chunk.default, aten.unbind.int, aten.alias.default,
}  # fmt: skip
"""calls that move nothing"""

_LOOKUPS = {aten.embedding.default, aten.index_select.default, quantized_embedding.overload}
_RECURRENCE_FLOPS = 6
"""per element of a recurrent state and token: decay it, add to it, read it"""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What something costs in a step of T tokens of S sequences, R of whose tokens want logits.

    Attributes:
        flops_per_token, flops_per_row: operations for each of the T and of the R.
        flops_per_key: operations for each token and each token of its context that it sees.
        window: most tokens that a token sees; None for all.
        weight_bytes: read once per step.
        share_of_weights: share of them that one token needs.
        bytes_per_token, bytes_per_row: values that are written and read, table rows looked up, states written.
        state_bytes_per_key: read for each sequence and each token of its context that is seen.
        state_bytes_per_sequence: read and written for each sequence.
    """

    flops_per_token: int = 0
    flops_per_row: int = 0
    flops_per_key: int = 0
    window: int | None = None
    weight_bytes: int = 0
    share_of_weights: float = 1.0
    bytes_per_token: int = 0
    bytes_per_row: int = 0
    state_bytes_per_key: int = 0
    state_bytes_per_sequence: int = 0

    @property
    def kind(self) -> tuple[int | None, float]:
        """Costs of one kind can be added."""
        return self.window, self.share_of_weights


@dataclass(frozen=True, kw_only=True)
class Step:
    """What a step does: `tokens` of `sequences`, each of which sees `keys` tokens on average and at most `context`."""

    tokens: int
    sequences: int
    context: int
    keys: float
    rows: int

    @classmethod
    def decode(cls, sequences: int, context: int) -> "Step":
        return cls(tokens=sequences, sequences=sequences, context=context, keys=context, rows=sequences)

    @classmethod
    def prefill(cls, tokens: int) -> "Step":
        return cls(tokens=tokens, sequences=1, context=tokens, keys=(tokens + 1) / 2, rows=1)


def total(costs: Iterable[Cost]) -> list[Cost]:
    """Costs added up, one sum per window and share of weights; costs that have neither go with whatever there is."""
    sums: dict[tuple[int | None, float], Cost] = {}
    for cost in costs:
        before = sums.get(cost.kind, Cost(window=cost.window, share_of_weights=cost.share_of_weights))
        added = {
            field.name: getattr(before, field.name) + getattr(cost, field.name)
            for field in dataclasses.fields(Cost)
            if field.name not in ("window", "share_of_weights")
        }
        sums[cost.kind] = dataclasses.replace(before, **added)
    return list(sums.values())


def roofline(cost: Cost, step: Step, limits: MachineLimits) -> tuple[float, float]:
    """Seconds that a step needs at the least, for its operations and for its bytes; the larger one counts."""
    seen = step.keys if cost.window is None else min(step.keys, cost.window)
    flops = step.tokens * (cost.flops_per_token + seen * cost.flops_per_key) + step.rows * cost.flops_per_row
    touched = 1.0 if cost.share_of_weights == 1.0 else 1.0 - (1.0 - cost.share_of_weights) ** step.tokens
    keys = step.context if cost.window is None else min(step.context, cost.window + step.tokens // step.sequences - 1)
    moved = cost.weight_bytes * touched + step.tokens * cost.bytes_per_token + step.rows * cost.bytes_per_row
    moved += step.sequences * (keys * cost.state_bytes_per_key + cost.state_bytes_per_sequence)
    return flops / limits.matmul_gflop_per_second / 1e9, moved / limits.memory_gb_per_second / 1e9


def node_cost(graph: ModelGraph, node: fx.Node) -> Cost:
    """What a node of a lowered graph costs; nothing for what moves nothing."""
    if node.op != "call_function" or node.target in _VIEWS:
        return Cost()
    sizes = _Sizes(graph)
    results = _tensors(node)
    read = [tensor for source in node.all_input_nodes if source.op == "call_function" for tensor in _tensors(source)]
    weights = [graph.weights[str(source.target)] for source in node.all_input_nodes if graph.recipe(source) is not None]
    if node.target in _LOOKUPS:
        read, weights = results, []  # as many entries of the table are read as results are written
    states = [spec for spec in graph.states if any(source.target == spec.name for source in node.all_input_nodes)]
    per_key = sum(spec.bytes_per_token for spec in states if isinstance(spec, PagedState))
    work, on_rows = _work(node, sizes), sizes.has_rows(results)
    return Cost(
        flops_per_token=0 if on_rows else work.flops_per_token,
        flops_per_row=work.flops_per_token if on_rows else 0,
        flops_per_key=work.flops_per_key,
        window=work.window,
        weight_bytes=sum(map(weight_bytes, weights)),
        share_of_weights=work.share_of_weights,
        bytes_per_token=sizes.per_token(read, num_bytes=True) + sizes.per_token(results, num_bytes=True) + per_key,
        bytes_per_row=sizes.per_row(read) + sizes.per_row(results),
        state_bytes_per_key=per_key,
        state_bytes_per_sequence=2 * sum(s.bytes_per_slot for s in states if isinstance(s, SlotState)),
    )


def _work(node: fx.Node, sizes: "_Sizes") -> Work:
    """What the op says, else an estimate: each weight used once and each result computed once per token."""
    op = find_op(node.target)
    if op is not None and op.work is not None:
        values = fx.map_arg((node.args, node.kwargs), lambda source: source.meta["val"])
        return op.work(**op.arguments(*values))
    results, graph = _tensors(node), sizes.graph
    flops = sizes.per_token(results, num_bytes=False)
    if node.target not in _LOOKUPS:
        weights = [graph.recipe(source) for source in node.all_input_nodes]
        flops += 2 * sum(math.prod(w.shape) for w in weights if w is not None and len(w.shape) > 1)
    states = [spec for spec in graph.states if any(source.target == spec.name for source in node.all_input_nodes)]
    flops += _RECURRENCE_FLOPS * sum(math.prod(spec.shape) for spec in states if isinstance(spec, SlotState))
    per_key = 0
    if any(isinstance(spec, PagedState) for spec in states):
        per_key = 4 * sizes.per_token(_tensors(node.all_input_nodes[0]), num_bytes=False)
    windows = [spec.window for spec in states if isinstance(spec, PagedState) and spec.window is not None]
    return Work(flops_per_token=flops, flops_per_key=per_key, window=min(windows, default=None))


def _tensors(node: fx.Node) -> list[Tensor]:
    value = node.meta.get("val")
    values = value if isinstance(value, list | tuple) else [value]
    return [part for part in values if isinstance(part, Tensor)]


@dataclass(frozen=True)
class _Sizes:
    """Sizes of a graph's tensors by what they grow with: tokens, rows of logits, or neither."""

    graph: ModelGraph

    def per_token(self, tensors: Iterable[Tensor], *, num_bytes: bool) -> int:
        return self._sum(tensors, self._symbol("input_ids", 1), num_bytes=num_bytes)

    def per_row(self, tensors: Iterable[Tensor]) -> int:
        return self._sum(tensors, self._symbol("logits_indices", 0), num_bytes=True)

    def has_rows(self, tensors: Iterable[Tensor]) -> bool:
        return self.per_row(tensors) > 0

    def _symbol(self, name: str, dim: int) -> object:
        node = self.graph.input(name)
        size = None if node is None else node.meta["val"].shape[dim]
        return size.node.expr if isinstance(size, torch.SymInt) else None

    def _sum(self, tensors: Iterable[Tensor], symbol: object, *, num_bytes: bool) -> int:
        count = 0
        for tensor in tensors:
            symbolic = [size.node.expr for size in list[Any](tensor.shape) if isinstance(size, torch.SymInt)]
            if symbol is None or not any(symbol in expression.free_symbols for expression in symbolic):
                continue
            each = math.prod(size for size in tensor.shape if isinstance(size, int))
            each *= math.prod(int(e.subs({symbol: 1})) for e in symbolic if e.free_symbols == {symbol})
            count += each * (tensor.dtype.itemsize if num_bytes else 1)
        return count
