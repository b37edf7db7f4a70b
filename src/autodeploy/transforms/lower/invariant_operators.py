"""Which operators of torch give an element the same bits whatever stands beside it; others are refused by name.

Not among them, on CPUs: sums and products, whose order depends on shapes; and functions of which torch has one version
for whole vectors and another one for what is left at the end, such as sigmoid (tests/transforms/lower/).
"""

import operator

import torch
from torch import fx

from autodeploy.errors import UnsupportedModelError
from autodeploy.graph.model_graph import ModelGraph, module_path, source_line
from autodeploy.ops.op import find_op

MOVES = {
    *("sym_size", "embedding", "index_select", "gather", "index", "slice", "select", "narrow"),
    *("unbind", "unsqueeze", "squeeze", "reshape", "view", "_unsafe_view", "flatten", "unflatten"),
    *("transpose", "permute", "t", "expand", "expand_as", "cat", "stack", "chunk", "split"),
    *("split_with_sizes", "contiguous", "clone", "alias", "detach", "to", "_to_copy", "type_as"),
    *("repeat", "repeat_interleave", "pad", "constant_pad_nd", "flip"),
}
"""What moves or converts elements."""
MAKES = {
    *("arange", "full", "zeros", "ones", "full_like", "zeros_like", "ones_like", "new_zeros"),
    *("new_ones", "new_full"),
}
"""What makes tensors of constants."""
EXACT = {
    *("add", "sub", "rsub", "mul", "div", "neg", "abs", "sqrt", "reciprocal", "minimum", "maximum"),
    *("clamp", "clamp_min", "clamp_max", "relu", "where", "masked_fill", "eq", "ne", "lt", "le", "gt"),
    *("ge", "logical_and", "logical_or", "logical_not", "bitwise_and", "bitwise_or", "bitwise_not"),
    *("floor", "ceil", "round", "sign"),
}
"""What is rounded once, or not at all, in any version."""
SAME_EVERYWHERE = {"exp", "log", "cos", "sin", "tanh", "erf"}
"""Functions whose version for the end of a tensor is that for vectors."""
ROW_BY_ROW = {"softmax", "_softmax", "log_softmax", "topk", "sort", "argmax", "layer_norm"}
"""What treats every row of its last dimension by itself."""
POWERS = (2, 3)
"""Exponents with which a power is a product."""

INVARIANT = MOVES | MAKES | EXACT | SAME_EVERYWHERE | ROW_BY_ROW


def require_invariant_operators(graph: ModelGraph) -> None:
    """Raises UnsupportedModelError for an operator, none of our ops, that may give an element other bits elsewhere."""
    for node in graph.graph.find_nodes(op="call_module"):
        _refuse(node, str(node.target))
    for node in graph.graph.nodes:
        if node.op != "call_function" or node.target is operator.getitem or find_op(node.target) is not None:
            continue
        name = _name(node)
        is_power = name == "pow" and node.args[1] in POWERS
        if not isinstance(_example(node), torch.Tensor):
            continue  # sizes
        if not (is_power or name in INVARIANT):
            _refuse(node, name)
        if name in ROW_BY_ROW and not _is_of_last_dim(node):
            _refuse(node, f"{name} of another dimension than the last")


def _refuse(node: fx.Node, name: str) -> None:
    raise UnsupportedModelError(
        f"batch_invariant: {name} in module {module_path(node) or '(top)'} at {source_line(node)} may give other bits "
        "in another batch; leave batch_invariant out for this model"
    )


def _name(node: fx.Node) -> str:
    """The operator's name; one of another library than ATen has its library's name too."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return str(node.target)
    library, _, name = node.target._schema.name.partition("::")
    return name if library == "aten" else f"{library}::{name}"


def _example(node: fx.Node) -> object:
    value = node.meta.get("val")
    return value[0] if isinstance(value, tuple | list) and value else value


def _is_of_last_dim(node: fx.Node) -> bool:
    value, source = _example(node), node.args[0]
    assert isinstance(value, torch.Tensor) and isinstance(source, fx.Node)
    if _name(node) == "layer_norm":
        return len(node.args[1]) == 1  # type: ignore[arg-type]
    position = 2 if _name(node) == "topk" else 1
    dim = node.args[position] if len(node.args) > position else -1
    return isinstance(dim, int) and dim % source.meta["val"].dim() == source.meta["val"].dim() - 1
