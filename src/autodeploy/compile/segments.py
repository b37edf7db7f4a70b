"""A lowered graph cut into segments: regions that can be captured by numbers of tokens, and what runs between them.

A region's calls depend on the number of tokens alone. Between regions stand calls that are not capture-safe, and those
that depend on sequences or on rows of logits: attention over page tables, and the head. Which is which follows from the
kernels' traits and the declared sizes of batch inputs.

Inductor compiles regions, CUDA graphs capture them.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from autodeploy.compile.bind import PLAN
from autodeploy.compile.observe import depends_on_values
from autodeploy.graph.model_graph import ModelGraph
from autodeploy.ops.batch_inputs import lookup
from autodeploy.ops.op import StepPlan, find_op

SegmentFunction = Callable[..., Sequence[Tensor]]
CompileRegion = Callable[[fx.GraphModule], SegmentFunction]


@dataclass
class Segment:
    """Consecutive calls of a graph.

    Attributes:
        function: of `inputs` in order; gives `outputs` in order.
        inputs: batch inputs, states and values of earlier segments, by name.
        outputs: values that later segments read, or the graph's result.
        is_region: whether it depends on the number of tokens alone and may be captured.
        unread: values that nobody reads behind this segment.
    """

    function: SegmentFunction
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    is_region: bool
    unread: tuple[str, ...] = ()


@dataclass(frozen=True)
class Segments:
    """A step, segment by segment.

    Attributes:
        result: name of the value that the graph gives.
        unsafe: names of ops that cannot be captured, with their providers; without any the whole step can be.
        plans: to be prepared before each step, as `Program.run` does.
    """

    segments: tuple[Segment, ...]
    result: str
    unsafe: tuple[str, ...]
    plans: tuple[StepPlan, ...] = ()

    def run(self, inputs: Mapping[str, Tensor], values: dict[str, Tensor] | None = None) -> Tensor:
        """One step, call by call.

        Args:
            inputs: batch inputs and states by name.
            values: filled with what crosses segments; by default it is forgotten as early as can be.
        """
        kept = {} if values is None else values
        result = torch.empty(0)
        for segment in self.segments:
            arguments = [inputs[name] if name in inputs else kept[name] for name in segment.inputs]
            kept.update(zip(segment.outputs, segment.function(*arguments), strict=True))
            if self.result in segment.outputs:
                result = kept[self.result]
            if values is None:
                for name in segment.unread:
                    del kept[name]
        return result


class Cut:
    """Where a lowered graph is to be cut; made before its nodes are bound to kernels.

    Args:
        graph: at level LOWERED.
    """

    def __init__(self, graph: ModelGraph) -> None:
        self._graph = graph
        self._segment_of: dict[fx.Node, int] = {}
        self._is_region: list[bool] = []
        self._unsafe: list[str] = []
        by_sequence = _nodes_by_sequence(graph)
        for node in graph.graph.nodes:
            if node.op != "call_function" or _is_size(node):
                continue
            if (producer := _producer(node)) is not node:
                self._segment_of[node] = self._segment_of[producer]
                continue
            reason = why_unsafe(node)
            if reason is not None and reason not in self._unsafe:
                self._unsafe.append(reason)
            is_region = reason is None and node not in by_sequence
            if not self._is_region or self._is_region[-1] != is_region:
                self._is_region.append(is_region)
            self._segment_of[node] = len(self._is_region) - 1

    def segments(self, compile_region: CompileRegion | None = None) -> Segments:
        """The segments of the graph as it is bound now, its weights in place.

        Args:
            compile_region: what makes a function of a region; default: it runs node by node.
        """
        members: list[list[fx.Node]] = [[] for _ in self._is_region]
        for node in self._graph.graph.nodes:
            if node in self._segment_of:
                members[self._segment_of[node]].append(node)
        (result,) = self._graph.graph.output_node().args
        assert isinstance(result, fx.Node)
        reads = [_outside_reads(nodes) for nodes in members]
        made: list[Segment] = []
        for number, nodes in enumerate(members):
            later = {node for others in reads[number + 1 :] for node in others} | {result}
            outputs = [node for node in nodes if node in later]
            module = _extracted(self._graph, nodes, reads[number], outputs)
            is_region = self._is_region[number]
            function = compile_region(module) if is_region and compile_region is not None else module.forward
            names = tuple(_name(node) for node in reads[number])
            made.append(Segment(function, names, tuple(node.name for node in outputs), is_region))
        _note_last_reads(made)
        plans = dict.fromkeys(node.meta[PLAN] for node in self._segment_of if PLAN in node.meta)
        return Segments(tuple(made), result.name, tuple(self._unsafe), tuple(plans))


def _name(node: fx.Node) -> str:
    return str(node.target) if node.op == "placeholder" else node.name


def _nodes_by_sequence(graph: ModelGraph) -> set[fx.Node]:
    """Nodes whose work depends on the number of sequences, of pages, or of rows of logits.

    What an op over state gives has a row for each token again.
    """
    found: set[fx.Node] = set()
    for node in graph.graph.nodes:
        if node.op == "placeholder":
            declared = lookup(str(node.target))
            is_by_sequence = declared is not None and not {*declared.dims} <= {1, "T"}
        else:
            is_by_sequence = any(other in found and not _is_mixer(other) for other in node.all_input_nodes)
        if is_by_sequence:
            found.add(node)
    return found


def _is_mixer(node: fx.Node) -> bool:
    op = find_op(_producer(node).target)
    return op is not None and op.is_cached


def _producer(node: fx.Node) -> fx.Node:
    """The node whose tuple this one takes a part of, or itself."""
    while getattr(node.target, "__name__", "") == "getitem":
        (node, _) = node.args  # type: ignore[assignment]
    return node


def _is_size(node: fx.Node) -> bool:
    """Whether a node gives a number that follows from shapes; every segment works those out for itself."""
    if node.op != "call_function":
        return False
    if isinstance(node.target, OpOverload):
        return node.target is torch.ops.aten.sym_size.int
    return bool(node.all_input_nodes) and all(_is_size(other) for other in node.all_input_nodes)


def why_unsafe(node: fx.Node) -> str | None:
    """Why a call cannot be captured, or None."""
    op = find_op(node.target)
    if op is not None:
        provider = node.meta["provider"]
        return None if op.is_capture_safe(provider) else f"{op.name} by {provider}"
    given = [value for other in node.all_input_nodes if isinstance(value := other.meta.get("val"), Tensor)]
    is_unsafe = isinstance(node.target, OpOverload) and depends_on_values(node.target, given)
    return str(node.target) if is_unsafe else None


def _outside_reads(nodes: Iterable[fx.Node]) -> list[fx.Node]:
    """Inputs of the graph and values of other segments that these nodes read, sizes of them included, in order."""
    own, found = set(nodes), dict[fx.Node, None]()

    def visit(node: fx.Node) -> None:
        for other in node.all_input_nodes:
            if _is_size(other):
                visit(other)
            elif other not in own and other.op != "get_attr":
                found[other] = None

    for node in nodes:
        visit(node)
    return list(found)


def _extracted(
    graph: ModelGraph, nodes: Iterable[fx.Node], reads: Iterable[fx.Node], outputs: Iterable[fx.Node]
) -> fx.GraphModule:
    """A module of some nodes of a graph; weights and constants are shared."""
    part = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in reads:
        copies[node] = part.placeholder(node.name)
        copies[node].meta = dict(node.meta)

    def copied(node: fx.Node) -> fx.Node:
        if node not in copies:  # a weight, a size, or the next of the nodes
            for other in node.all_input_nodes:
                copied(other)
            copies[node] = part.node_copy(node, lambda other: copies[other])
        return copies[node]

    for node in nodes:
        copied(node)
    part.output(tuple(copies[node] for node in outputs))
    return fx.GraphModule(graph.module, part)


def _note_last_reads(segments: Sequence[Segment]) -> None:
    values = {name for segment in segments for name in segment.outputs}
    read = set[str]()
    for segment in reversed(segments):
        crossing = [name for name in (*segment.inputs, *segment.outputs) if name in values]
        segment.unread = tuple(name for name in crossing if name not in read)
        read.update(crossing)
