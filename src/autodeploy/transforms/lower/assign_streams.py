"""AssignStreams: calls that need nothing of each other are marked, so that a device may run them side by side."""

import functools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, fx

from autodeploy.graph.model_graph import BRANCH, ModelGraph
from autodeploy.graph.transform import Transform, TransformResult
from autodeploy.ops.op import find_op

_LOOKUPS = (torch.ops.aten.embedding.default, torch.ops.aten.index_select.default)


@dataclass(frozen=True)
class _Branches:
    """Two sets of calls between a fork and a join, in the graph's order; neither reads anything of the other.

    Attributes:
        beside: the lighter one, which may run on a stream of its own.
        others: the heavier one.
        join: the call that reads both.
    """

    beside: Sequence[fx.Node]
    others: Sequence[fx.Node]
    join: fx.Node


@dataclass(frozen=True, kw_only=True)
class AssignStreams(Transform):
    """`a = f(x); b = g(h(x)); join(a, b)`  keeps its calls, those of the lighter branch in one place and marked.

    A branch is what one argument of a call depends on and its other arguments do not: shared experts beside routed
    ones, queries beside latents. It holds no token mixer, and reads weights, as does what it runs beside.

    The order of independent calls changes, and nothing else. Backends that capture whole steps run branches on a second
    stream where they measure that this is faster (`compile/streams.py`); others run the graph as it stands.

    Attributes:
        least_bytes: of weights, that each of two branches reads; launching on two streams costs some microseconds.
        device: where the program runs; only CUDA devices have streams.
    """

    enabled: bool = False
    least_bytes: int = 1 << 20
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def apply(self, graph: ModelGraph) -> TransformResult:
        found, mixing = 0, 0
        taken = set[fx.Node]()
        for branches in self._candidates(graph):
            calls = {*branches.beside, *branches.others}
            if calls & taken:
                continue
            taken |= calls
            found += 1
            if self.device.type != "cuda":
                continue
            if any(_mixes_tokens(node) for node in _stretch(calls, branches.join)):
                mixing += 1
                continue
            _gather(branches)
            for node in branches.beside:
                node.meta[BRANCH] = found
        refused = []
        if self.device.type != "cuda" and found:
            refused.append(f"{found} branches: the device is {self.device.type}, and streams are of CUDA devices")
        if mixing:
            refused.append(f"{mixing} branches: a token mixer stands between fork and join")
        rewritten = found - mixing if self.device.type == "cuda" else 0
        return TransformResult(found=found, rewritten=rewritten, refused=tuple(refused))

    def _candidates(self, graph: ModelGraph) -> Iterator[_Branches]:
        """For each call in turn, the heaviest pair of branches that it joins, if both are heavy enough."""
        calls = [node for node in graph.graph.nodes if node.op == "call_function" and not _is_size(node)]
        number = {node: index for index, node in enumerate(calls)}
        bytes_read = [_weight_bytes(node) for node in calls]
        needed: list[int] = []  # for each call, itself and what it depends on, a bit each
        for index, node in enumerate(calls):
            arguments = [needed[number[other]] for other in node.all_input_nodes if other in number]
            needed.append(functools.reduce(int.__or__, arguments, 1 << index))
            best: tuple[int, int, int] = (0, 0, 0)
            for position, own in enumerate(arguments):
                rest = functools.reduce(int.__or__, arguments[:position] + arguments[position + 1 :], 0)
                sides = sorted((_total(bytes_read, part), part) for part in (own & ~rest, rest & ~own))
                best = max(best, (sides[0][0], sides[0][1], sides[1][1]))
            if best[0] >= max(1, self.least_bytes):
                beside, others = ([calls[bit] for bit in _bits(part)] for part in best[1:])
                yield _Branches(beside, others, node)


def _gather(branches: _Branches) -> None:
    """Before the join: what depends on neither branch, the lighter branch, the heavier, and what depends on either."""
    calls = {*branches.beside, *branches.others}
    stretch, late = _stretch(calls, branches.join), set[fx.Node]()
    for node in stretch:
        if node not in calls and any(other in calls or other in late for other in node.all_input_nodes):
            late.add(node)
    for node in (*branches.beside, *branches.others, *(node for node in stretch if node in late)):
        branches.join.prepend(node)


def _stretch(calls: Iterable[fx.Node], join: fx.Node) -> list[fx.Node]:
    """All nodes from the first of these calls up to the join."""
    node, stretch = min(calls), list[fx.Node]()
    while node is not join:
        stretch.append(node)
        node = node.next
    return stretch


def _mixes_tokens(node: fx.Node) -> bool:
    op = find_op(node.target)
    return op is not None and op.mixes_tokens


def _is_size(node: fx.Node) -> bool:
    return not isinstance(node.meta["val"], Tensor | tuple | list)


def _weight_bytes(node: fx.Node) -> int:
    """Bytes of the weights that a call reads whole."""
    weights = [other.meta["val"] for other in node.all_input_nodes if other.op == "get_attr"]
    return 0 if node.target in _LOOKUPS else sum(weight.numel() * weight.element_size() for weight in weights)


def _bits(part: int) -> Iterator[int]:
    while part:
        lowest = part & -part
        yield lowest.bit_length() - 1
        part ^= lowest


def _total(bytes_read: Sequence[int], part: int) -> int:
    return sum(bytes_read[bit] for bit in _bits(part))
