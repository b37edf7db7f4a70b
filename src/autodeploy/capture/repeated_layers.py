"""Layers that are one function with other weights are traced a few times, and written out for every call of them.

In: a model about to be traced, then the traced program. Out: the program as a full trace would have given it. The
model's own loop over its layers runs in full; of the layers that are alike, the first two and the last are traced, and
a call of another becomes one node, which `write_out` replaces by the second layer's nodes over the other's weights.

Layers are alike when their modules, scalar attributes and tensor shapes are equal. It is not taken on trust: a layer
must not look at its own index (`layer_index.py`), its nodes may read only its arguments, its weights and the graph's
inputs, nobody may read its inner values, and the second and the last must have equal nodes. Else everything is traced.
"""

import contextlib
import functools
import itertools
import types
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from autodeploy.capture.layer_index import LayerIndex, index_attributes
from autodeploy.ops.op import NAMESPACE

FEWEST = 4
"""layers that a list must have: three are traced in any case"""

_library = torch.library.Library(NAMESPACE, "FRAGMENT")
_library.define("layer_edge(Tensor[] values, int call) -> Tensor[]")
_library.define("layer_again(Tensor[] values, Tensor[] like, int call) -> Tensor[]")


def _alike(tensors: list[Tensor]) -> list[Tensor]:
    return [torch.empty_strided(x.size(), x.stride(), dtype=x.dtype, device=x.device) for x in tensors]


torch.library.register_fake(f"{NAMESPACE}::layer_edge", lambda values, call: _alike(values), lib=_library)
torch.library.register_fake(f"{NAMESPACE}::layer_again", lambda values, like, call: _alike(like), lib=_library)


class NotAlike(Exception):
    """Layers that looked alike are not; the message says why."""


@dataclass(frozen=True)
class _Layer:
    """A layer of a list: its path, a number it shares with those like it, and the attributes that hold its index."""

    path: str
    module: nn.Module
    alike: int
    indices: tuple[tuple[nn.Module, str], ...]


@dataclass
class Kind:
    """Calls of layers that are alike, with arguments that are alike."""

    alike: int
    arguments: object
    traced: list[int] = field(default_factory=list)
    """numbers of the calls that were traced, in order"""
    output: tuple[list[Any], Any] = field(default_factory=lambda: ([], None))
    """leaves and structure of what the second call gave, its tensors as they came out of its edge"""
    counted: dict[str, Counter[str]] = field(default_factory=dict)
    """by how much a call raises each counter of the hooks"""


@dataclass(frozen=True)
class Call:
    """One call of a layer. `template` is the number of the call whose nodes it repeats, or None when it was traced."""

    path: str
    kind: Kind
    template: int | None = None


class RepeatedLayers:
    """The layers of one model while it is traced, and the calls that were made of them.

    Args:
        model: as its user made it, before anything is replaced for tracing.
    """

    def __init__(self, model: nn.Module):
        self.calls: list[Call] = []
        self.refused: dict[str, None] = {}
        """why layers that look alike were traced one by one"""
        self._counters: object = None
        self._layers = _find_layers(model)
        self._last = {layer.alike: layer for layer in self._layers}
        self._kinds: list[Kind] = []
        self._alone: set[int] = set()

    def summary(self) -> str:
        """One sentence for the report."""
        repeated = sum(call.template is not None for call in self.calls)
        reasons = "".join(f"; {reason}" for reason in self.refused)
        return f"{repeated} of {len(self._layers)} layers were written out from ones like them{reasons}"

    def begin(self) -> None:
        """The model's forward begins, maybe once more: forget what an earlier run of it called."""
        self.calls.clear()
        self._kinds.clear()

    @contextlib.contextmanager
    def installed(self, counters: object) -> Iterator[None]:
        """While open, calls of layers leave edges or single nodes in the trace; undone on leaving.

        Args:
            counters: the object whose attributes, integers and counters, count what layers do while they are traced.
        """
        self._counters = counters
        members = Counter(layer.alike for layer in self._layers)
        with contextlib.ExitStack() as stack:
            for layer in self._layers:
                if members[layer.alike] >= FEWEST:
                    stack.enter_context(self._forward(layer))
            yield

    @contextlib.contextmanager
    def _forward(self, layer: _Layer) -> Iterator[None]:
        state = vars(layer.module)
        had, forward = "forward" in state, layer.module.forward
        numbers = [vars(module)[name] for module, name in layer.indices]
        watched = [LayerIndex(number, lambda: self._stand_alone(layer, "looks at its own index")) for number in numbers]
        for (module, name), number in zip(layer.indices, watched, strict=True):
            vars(module)[name] = number
        state["forward"] = lambda *args, **kwargs: self._call(layer, forward, args, kwargs)
        try:
            yield
        finally:
            for (module, name), number in zip(layer.indices, numbers, strict=True):
                vars(module)[name] = number
            if had:
                state["forward"] = forward
            else:
                del state["forward"]

    def _stand_alone(self, layer: _Layer, reason: str) -> None:
        self._alone.add(layer.alike)
        self.refused[f"{type(layer.module).__name__} {reason}"] = None

    def _call(self, layer: _Layer, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        leaves, structure = pytree.tree_flatten((args, kwargs))
        if layer.alike in self._alone:
            return forward(*args, **kwargs)
        kind = self._kind(layer, (_describe(leaves), structure))
        number = len(self.calls)
        if len(kind.traced) >= 2 and self._last[layer.alike] is not layer:
            self.calls.append(Call(layer.path, kind, kind.traced[1]))
            return self._again(kind, leaves, number)
        self.calls.append(Call(layer.path, kind))
        kind.traced.append(number)
        return self._trace(layer, kind, forward, leaves, structure)

    def _kind(self, layer: _Layer, arguments: object) -> Kind:
        for kind in self._kinds:
            if kind.alike == layer.alike and kind.arguments == arguments:
                return kind
        self._kinds.append(Kind(layer.alike, arguments))
        return self._kinds[-1]

    def _trace(self, layer: _Layer, kind: Kind, forward: Callable[..., Any], leaves: list[Any], structure: Any) -> Any:
        """The layer's own code between two edges."""
        number = len(self.calls) - 1
        args, kwargs = pytree.tree_unflatten(_through(leaves, lambda x: _edge(x, number)), structure)
        given, before = pytree.tree_flatten((args, kwargs)), _counts(self._counters)
        outputs, form = pytree.tree_flatten(forward(*args, **kwargs))
        after, structure = pytree.tree_flatten((args, kwargs))
        if structure != given[1] or any(a is not b for a, b in zip(after, given[0], strict=True)):
            raise NotAlike(f"{layer.path} changes a container among its arguments")
        kind.counted = {name: count - before[name] for name, count in _counts(self._counters).items()}
        outputs = _through(outputs, lambda x: _edge(x, number))
        if len(kind.traced) == 2:
            kind.output = outputs, form
        return pytree.tree_unflatten(outputs, form)

    def _again(self, kind: Kind, leaves: list[Any], number: int) -> Any:
        """One node in place of the layer's."""
        for name, count in kind.counted.items():
            vars(self._counters)[name] += count[""] if type(vars(self._counters)[name]) is int else count
        outputs, form = kind.output
        values = list(_tensors(leaves).values())
        again = _through(outputs, lambda like: torch.ops.autodeploy.layer_again(values, like, number))
        return pytree.tree_unflatten(again, form)


def _edge(values: list[Tensor], number: int) -> list[Tensor]:
    edge: list[Tensor] = torch.ops.autodeploy.layer_edge(values, number)
    return edge


def _tensors(leaves: list[Any]) -> dict[int, Tensor]:
    """The different tensors among leaves, by identity, in order."""
    return {id(leaf): leaf for leaf in leaves if isinstance(leaf, Tensor)}


def _through(leaves: list[Any], function: Callable[[list[Tensor]], list[Tensor]]) -> list[Any]:
    """Leaves whose tensors went through a function of all of them; a tensor that occurs twice still does."""
    tensors = _tensors(leaves)
    mapped = dict(zip(tensors, function(list(tensors.values())), strict=True))
    return [mapped.get(id(leaf), leaf) for leaf in leaves]


def _counts(counters: object) -> dict[str, Counter[str]]:
    """A copy of an object's counters; a plain integer counts one kind of thing."""
    values = {name: Counter({"": value}) if type(value) is int else value for name, value in vars(counters).items()}
    return {name: value.copy() for name, value in values.items() if isinstance(value, Counter)}


def _describe(leaves: list[Any]) -> tuple[object, ...]:
    """Arguments as far as traced nodes can depend on them: tensors by what is known of them, objects by identity."""
    order = {key: place for place, key in enumerate(_tensors(leaves))}
    return tuple(
        (order[id(leaf)], leaf.dtype, leaf.device, *map(_size, leaf.shape), *map(_size, leaf.stride()))
        if isinstance(leaf, Tensor)
        else _size(leaf)
        if isinstance(leaf, torch.SymInt)
        else _fact(leaf)
        for leaf in leaves
    )


def _size(size: Any) -> object:
    return size.node.expr if isinstance(size, torch.SymInt) else size


def _find_layers(model: nn.Module) -> list[_Layer]:
    """The members of long module lists, except lists inside such members and layers that share a parameter."""
    found: list[_Layer] = []
    kinds: dict[object, int] = {}
    owners = _owners(model)
    for path, members in model.named_modules():
        inside = any(path.startswith(layer.path + ".") for layer in found)
        if not isinstance(members, nn.ModuleList) or len(members) < FEWEST or inside:
            continue
        names = index_attributes(members)
        inner = [_owners(module) for module in members]
        holders = Counter(key for owned in inner for key in owned)
        for position, (module, owned) in enumerate(zip(members, inner, strict=True)):
            if any(holders[key] > 1 or owned[key] < owners[key] for key in owned):
                continue
            indices = tuple((m, name) for at, m in module.named_modules() for name in vars(m) if (at, name) in names)
            kind = kinds.setdefault(_facts(module, names), len(kinds))
            found.append(_Layer(f"{path}.{position}", module, kind, indices))
    return found


def _owners(root: nn.Module) -> Counter[int]:
    """How many modules hold each parameter."""
    return Counter(id(p) for module in root.modules() for p in module._parameters.values() if p is not None)


def _facts(layer: nn.Module, indices: set[tuple[str, str]]) -> tuple[object, ...]:
    """What a layer's code can depend on, weights and its index apart; equal facts make equal layers."""
    own = ("_parameters", "_buffers", "_modules")
    return tuple(
        (
            path,
            type(module),
            tuple(
                (name, _fact(value, module))
                for name, value in sorted(vars(module).items())
                if name not in own and (path, name) not in indices
            ),
            tuple(
                (name, None if tensor is None else (tuple(tensor.shape), tensor.dtype))
                for name, tensor in itertools.chain(module._parameters.items(), module._buffers.items())
            ),
        )
        for path, module in layer.named_modules()
    )


def _fact(value: Any, module: nn.Module | None = None) -> object:
    """A value to compare by: numbers and containers by what they hold, anything else by identity.

    Args:
        module: whose attribute it is; a method of its own is the same as another's.
    """
    match value:
        case None | bool() | int() | float() | str() | torch.dtype() | torch.device():
            return type(value), value
        case list() | tuple():
            return type(value), tuple(_fact(part, module) for part in value)
        case dict():
            return type(value), tuple((_fact(key, module), _fact(part, module)) for key, part in value.items())
        case set() | frozenset():
            return type(value), frozenset(_fact(part, module) for part in value)
        case functools.partial():
            return functools.partial, tuple(_fact(part, module) for part in (value.func, value.args, value.keywords))
        case types.MethodType() if value.__self__ is module:
            return types.MethodType, value.__func__
        case _:
            return "object", id(value)
