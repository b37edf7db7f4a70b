"""Lowered graphs as files: a graph goes in, JSON and constants come out, and the same graph comes back from them.

Everything in the file is data: operators are names looked up in `torch.ops` and `operator`, weights are recipes. Values
of nodes come back as meta tensors with the sizes of the example that the graph was traced with.
"""

import functools
import json
import operator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import fx, nn
from torch._ops import OpOverload

from autodeploy.checkpoint.quantize import Float4Format, Float8Format, NumberFormat
from autodeploy.checkpoint.recipe import Cast, Concat, Pointwise, Quantize, Recipe, Reshape, Slice, Source, Transpose
from autodeploy.graph.levels import Level
from autodeploy.graph.model_graph import BRANCH, ModelGraph
from autodeploy.ops.state import PagedState, SlotState

GRAPH_FILE, CONSTANTS_FILE = "graph.json", "constants.safetensors"

_RECORDS: dict[str, type[Any]] = {
    cls.__name__: cls
    for cls in (
        *(Source, Slice, Concat, Cast, Transpose, Reshape, Pointwise, Quantize),
        *(NumberFormat, Float8Format, Float4Format),
        *(PagedState, SlotState),
    )
}
"""Dataclasses that may stand in a file, by name."""


class NotSavable(Exception):
    """The graph holds something that a file cannot: a nested graph, or a function that is no named operator."""


def save(description: dict[str, Any], graph: ModelGraph, folder: Path, extra: dict[str, Any]) -> None:
    """Write a graph that was described, its constants, and `extra` JSON values, into an existing folder."""
    (folder / GRAPH_FILE).write_text(json.dumps(description | {"extra": extra}), encoding="utf-8")
    constants = {name: buffer.detach().cpu().contiguous().clone() for name, buffer in graph.module.named_buffers()}
    save_file(constants, folder / CONSTANTS_FILE)


def restore(folder: Path) -> tuple[ModelGraph, dict[str, Any]]:
    """The graph in a folder, at level LOWERED and without weights, and the extra values saved with it.

    Its module's code is made when kernels are bound, not here: that takes as long as all the rest.
    """
    document = json.loads((folder / GRAPH_FILE).read_text(encoding="utf-8"))
    module = fx.GraphModule({}, fx.Graph())
    weights: dict[str, Recipe] = {name: _decode(recipe, {}) for name, recipe in document["weights"].items()}
    for name, recipe in weights.items():
        meta = torch.empty(recipe.shape, dtype=recipe.dtype, device="meta")
        module.register_parameter(name, nn.Parameter(meta, requires_grad=False))
    for name, constant in load_file(folder / CONSTANTS_FILE).items():
        module.register_buffer(name, constant, persistent=False)
    nodes: dict[str, fx.Node] = {}
    for entry in document["nodes"]:
        target = _find(entry["target"]) if entry["op"] == "call_function" else entry["target"]
        args, kwargs = _decode(entry["args"], nodes), _decode(entry["kwargs"], nodes)
        node = module.graph.create_node(entry["op"], target, args, kwargs, name=entry["name"])
        nodes[entry["name"]] = node
        kept = {"provider": entry["provider"], BRANCH: entry["branch"]}
        node.meta = {key: value for key, value in kept.items() if value is not None}
        if entry["value"] is not None:
            dtype, sizes = entry["value"]
            node.meta["val"] = torch.empty(sizes, dtype=getattr(torch, dtype), device="meta")
    graph = ModelGraph(
        document["name"],
        module,
        None,  # making one imports the tracer, which takes longer than the rest
        weights,
        level=Level.LOWERED,
        states=[_decode(state, {}) for state in document["states"]],
        max_length=document["max_length"],
        state_writes=document["state_writes"],
    )
    return graph, document["extra"]


def describe(graph: ModelGraph) -> dict[str, Any]:
    """The graph as JSON values, constants left out.

    Raises:
        NotSavable: it holds something that a file cannot.
    """
    if any(True for _ in graph.module.children()):
        raise NotSavable("it holds graphs inside the graph")
    return {
        "name": graph.name,
        "max_length": graph.max_length,
        "state_writes": graph.state_writes,
        "weights": {name: _encode(recipe) for name, recipe in graph.weights.items()},
        "states": [_encode(state) for state in graph.states],
        "nodes": [
            {
                "op": node.op,
                "name": node.name,
                "target": _name(node.target) if node.op == "call_function" else str(node.target),
                "args": _encode(node.args),
                "kwargs": _encode(dict(node.kwargs)),
                "provider": node.meta.get("provider"),
                "branch": node.meta.get(BRANCH),
                "value": _value(node.meta.get("val")),
            }
            for node in graph.graph.nodes
        ],
    }


def _value(value: object) -> list[Any] | None:
    if not isinstance(value, torch.Tensor):
        return None
    sizes = [size.node.hint if isinstance(size, torch.SymInt) else size for size in value.shape]
    return [str(value.dtype).removeprefix("torch."), sizes]


def _name(target: object) -> str:
    if isinstance(target, OpOverload):
        return f"ops.{target.namespace}.{target._schema.name.split('::')[1]}.{target._overloadname}"
    name = getattr(target, "__name__", "")
    if getattr(operator, name, None) is target:
        return f"operator.{name}"
    raise NotSavable(f"{target!r} is no named operator")


def _find(name: str) -> Any:
    kind, *path = name.split(".")
    return functools.reduce(getattr, path, torch.ops if kind == "ops" else operator)


def _encode(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, list | tuple):
        return {"tuple" if isinstance(value, tuple) else "list": [_encode(part) for part in value]}
    if isinstance(value, dict):
        return {"dict": {key: _encode(part) for key, part in value.items()}}
    if isinstance(value, torch.dtype | torch.layout | torch.memory_format):
        return {"torch": str(value).removeprefix("torch.")}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    name = type(value).__name__
    if _RECORDS.get(name) is type(value):
        return {"record": name, "fields": {key: _encode(part) for key, part in vars(value).items()}}
    raise NotSavable(f"a value of type {name}")


def _decode(value: Any, nodes: dict[str, fx.Node]) -> Any:
    match value:
        case {"node": name}:
            return nodes[name]
        case {"tuple": parts}:
            return tuple(_decode(part, nodes) for part in parts)
        case {"list": parts}:
            return [_decode(part, nodes) for part in parts]
        case {"dict": parts}:
            return {key: _decode(part, nodes) for key, part in parts.items()}
        case {"torch": name}:
            return getattr(torch, name)
        case {"device": name}:
            return torch.device(name)
        case {"record": name, "fields": fields}:
            return _RECORDS[name](**{key: _decode(part, nodes) for key, part in fields.items()})
        case _:
            return value
