"""verify(graph, level): the executable meaning of the graph levels, raising on the first thing that is not true."""

from collections.abc import Iterator

import torch
from torch import fx

from autodeploy.errors import GraphLevelError
from autodeploy.graph.levels import Level
from autodeploy.graph.model_graph import ModelGraph, module_path, source_line
from autodeploy.ops.batch_inputs import HIDDEN_STATES, lookup
from autodeploy.ops.captured import NUM_RUNS, captured_attention, captured_mask, captured_state
from autodeploy.ops.op import find_op

aten = torch.ops.aten

_CONVOLUTIONS = (aten.conv1d.default, aten.conv1d.padding, aten.convolution.default)

_MIXING_OPS = {
    aten.cumsum.default,
    aten.cumprod.default,
    aten.logcumsumexp.default,
    aten.roll.default,
    aten.unfold.default,
    aten.flip.default,
    aten.sort.default,
    *_CONVOLUTIONS,
    aten.scaled_dot_product_attention.default,
}
"""ATen ops that move information between positions when they run along the token dimension."""


def verify(graph: ModelGraph, level: Level) -> None:
    """Check that a graph is at a level, and set it.

    Raises:
        GraphLevelError: naming the node, its module and its source line.
    """
    checks = {
        Level.CAPTURED: _captured_faults,
        Level.CANONICAL: _canonical_faults,
        Level.CACHED: _cached_faults,
        Level.LOWERED: _lowered_faults,
    }
    for step in Level:
        if step <= level:
            fault = next(checks[step](graph, level), None)
            if fault is not None:
                raise GraphLevelError(f"graph {graph.name!r} is not {step.name}: {fault}")
    graph.level = level


def _describe(node: fx.Node) -> str:
    return f"{node.format_node()} in module {module_path(node) or '(top)'} at {source_line(node)}"


def _captured_faults(graph: ModelGraph, level: Level) -> Iterator[str]:
    input_ids = graph.input("input_ids")
    if input_ids is None:
        yield "it has no input_ids"
    rows, num_tokens = _rows_of_logits(graph), input_ids and input_ids.meta["val"].shape[1]
    if isinstance(rows, int) and rows == NUM_RUNS and isinstance(num_tokens, torch.SymInt):
        yield (
            f"it gives logits for {rows} tokens, however many there are; a loop over tokens is followed only where it"
            " collects what each step makes (docs/adding-an-op.md)"
        )
    for node in graph.graph.find_nodes(op="get_attr"):
        name = str(node.target)
        if name not in graph.weights and not isinstance(getattr(graph.module, name, None), torch.Tensor):
            yield f"weight {name!r} has no recipe"
    for node in graph.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            found = find_op(node.target)
            if found is None or level < Level.CACHED:
                yield f"something is updated in place by {_describe(node)}"


def _canonical_faults(graph: ModelGraph, level: Level) -> Iterator[str]:
    for op in (captured_attention, captured_mask):
        for node in graph.nodes(op):
            yield f"an attention call was left as it was captured: {_describe(node)}"
    for node in graph.nodes(captured_state):
        yield f"the state after the last token is read by the model itself: {_describe(node)}"
    for node in graph.graph.nodes:
        if "run" in node.meta:
            yield f"a loop over tokens was left as it was traced: {_describe(node)}"
    num_tokens = token_symbol(graph)
    others = [node for node in graph.graph.nodes if node.op == "call_function" and find_op(node.target) is None]
    for node in others:
        if node.target in _MIXING_OPS and runs_along_tokens(node, num_tokens):
            yield (
                f"{node.target} mixes tokens and no transform knows it: {_describe(node)}; make the mixer an op with a"
                " cached twin (docs/adding-an-op.md)"
            )
    for node in others:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and count_token_dims(value, num_tokens) >= 2:
            yield f"a token-by-token matrix is left, attention or mask arithmetic not recognised: {_describe(node)}"


def _cached_faults(graph: ModelGraph, level: Level) -> Iterator[str]:
    for node, found in graph.op_nodes():
        if found.states is not None:
            yield f"{found.name} has no cache: {_describe(node)}"
    given = {HIDDEN_STATES, *(spec.name for spec in graph.states)}
    for node in graph.inputs():
        if str(node.target) not in given and lookup(str(node.target)) is None:
            yield f"input {node.target!r} is neither a batch input nor a state"


def _lowered_faults(graph: ModelGraph, level: Level) -> Iterator[str]:
    for node, _ in graph.op_nodes():
        if "provider" not in node.meta:
            yield f"no provider was chosen for {_describe(node)}"


def token_symbol(graph: ModelGraph) -> object:
    """The symbolic number of tokens T, as the size of input_ids' second dimension."""
    input_ids = graph.input("input_ids")
    if input_ids is None:
        raise GraphLevelError(f"graph {graph.name!r} has no input_ids")
    size = input_ids.meta["val"].shape[1]
    if not isinstance(size, torch.SymInt) or not size.node.expr.free_symbols:
        raise GraphLevelError(
            f"graph {graph.name!r} was traced for exactly {size} tokens: some code in the model fixes the length"
        )
    return size.node.expr


def _rows_of_logits(graph: ModelGraph) -> object:
    """The number of rows of whole-sequence logits `[1, T, V]`; None once rows are picked."""
    (logits,) = graph.graph.output_node().args
    value = logits.meta.get("val") if isinstance(logits, fx.Node) else None
    return value.shape[1] if isinstance(value, torch.Tensor) and value.dim() == 3 else None


def count_token_dims(value: torch.Tensor, symbol: object) -> int:
    """How many of a value's dimensions grow with the number of tokens."""
    return sum(_is_token_size(size, symbol) for size in value.shape)


def _is_token_size(size: int | torch.SymInt, symbol: object) -> bool:
    return isinstance(size, torch.SymInt) and symbol in size.node.expr.free_symbols


def runs_along_tokens(node: fx.Node, symbol: object) -> bool:
    """True when an op that mixes along a dimension mixes along tokens; attention does along its keys' rows."""
    if node.target == aten.scaled_dot_product_attention.default:
        return _is_token_size(node.args[1].meta["val"].shape[-2], symbol)  # type: ignore[union-attr]
    value = node.args[0].meta.get("val") if isinstance(node.args[0], fx.Node) else None
    if not isinstance(value, torch.Tensor):
        return False
    if node.target in _CONVOLUTIONS:  # along its positions only: the first dimension holds signals of their own
        return count_token_dims(value[:1, :1], symbol) >= 1
    return count_token_dims(value, symbol) >= 1 and not _other_dim(node, value, symbol)


def _other_dim(node: fx.Node, value: torch.Tensor, symbol: object) -> bool:
    """True when the op names a dimension and it is not the token dimension."""
    dims = node.args[1] if len(node.args) > 1 else None
    if isinstance(dims, int):
        dims = [dims]
    if not isinstance(dims, list | tuple):
        return False
    sizes = [value.shape[dim] for dim in dims if isinstance(dim, int)]
    return not any(_is_token_size(size, symbol) for size in sizes)
