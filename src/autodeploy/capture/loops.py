"""Loops over tokens, as authors write recurrences in Python: seen while a model is traced, marked in the graph.

`for t in range(T)` cannot be traced when T is symbolic. While this is installed, a modeling module's `range` over the
row's number of tokens runs the body for the first few tokens only, and marks where each run begins and ends; a stack
or concatenation of what the runs gave becomes one op of T rows. `RollLoops` then finds the same calls in every run and
turns them into one recurrence. The counter is an integer that can do nothing but index, so that no step can differ
from another unseen.
"""

import builtins
import contextlib
import functools
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode, get_proxy_slot

from autodeploy.capture.hooks import Hooks
from autodeploy.errors import CaptureError
from autodeploy.ops.captured import NUM_RUNS, captured_run, captured_stack

_NOT_MODELS = ("torch", "numpy", "builtins", "transformers.utils", "transformers.modeling_utils", "autodeploy")
"""packages whose functions hold no model's loop, though modeling modules import them"""


class LoopIndex:
    """The counter of a loop over tokens: it indexes, alone or with a constant added, and refuses everything else."""

    def __init__(self, run: int):
        self._run = run

    def __index__(self) -> int:
        return self._run

    def __add__(self, other: int) -> "LoopIndex":
        return LoopIndex(self._run + other)

    __radd__ = __add__

    def __sub__(self, other: int) -> "LoopIndex":
        return LoopIndex(self._run - other)

    def _refuse(self, *_: Any) -> Any:
        raise CaptureError(
            "a loop over tokens does something else with its counter than index tensors by it, so its steps may differ;"
            " use a mask or a per-token tensor instead, or write the recurrence as an op (docs/adding-an-op.md)"
        )

    __eq__ = __lt__ = __le__ = __gt__ = __ge__ = __bool__ = __float__ = __int__ = __neg__ = __abs__ = _refuse
    __mul__ = __rmul__ = __mod__ = __rmod__ = __floordiv__ = __rfloordiv__ = __truediv__ = __rtruediv__ = _refuse
    __pow__ = __rpow__ = __divmod__ = __rsub__ = __and__ = __or__ = __xor__ = __lshift__ = __rshift__ = _refuse
    __hash__ = None  # type: ignore[assignment]


class Loops:
    """The loops over tokens of one capture."""

    def __init__(self, hooks: Hooks):
        self._hooks = hooks
        self._has_run = False
        self._is_open = False

    @contextlib.contextmanager
    def installed(self, model: nn.Module) -> Iterator[None]:
        """Give the model's code a `range` that knows loops over tokens; undone on leaving."""
        with contextlib.ExitStack() as stack:
            for namespace in _namespaces(model):
                stack.enter_context(_set(namespace, "range", self._range))
            for name, stacked in (("stack", True), ("cat", False), ("concat", False), ("concatenate", False)):
                stack.enter_context(_set(vars(torch), name, self._collecting(getattr(torch, name), stacked)))
            yield

    def _range(self, *bounds: Any) -> Any:
        start, stop = (0, bounds[0]) if len(bounds) == 1 else bounds[:2]
        step = bounds[2] if len(bounds) > 2 else 1
        if self._is_open or not self._is_num_tokens(stop) or start != 0 or step != 1:
            return builtins.range(*bounds)
        return self._runs()

    def _is_num_tokens(self, value: object) -> bool:
        if not isinstance(value, torch.SymInt):
            return False
        counts = (
            self._hooks.num_tokens,
            *(self._hooks.position_ids.shape[1:] if self._hooks.position_ids is not None else ()),
        )
        return any(isinstance(n, torch.SymInt) and str(n.node.expr) == str(value.node.expr) for n in counts)

    def _runs(self) -> Iterator[LoopIndex]:
        self._is_open = self._has_run = True
        assert self._hooks.cu_seqlens is not None
        try:
            for run in builtins.range(NUM_RUNS):
                captured_run(self._hooks.cu_seqlens, run)
                yield LoopIndex(run)
        finally:
            captured_run(self._hooks.cu_seqlens, -1)
            self._is_open = False

    def _collecting(self, original: Callable[..., Tensor], stacked: bool) -> Callable[..., Tensor]:
        @functools.wraps(original)
        def collect(tensors: Any, dim: int = 0, **kwargs: Any) -> Tensor:
            if self._has_run and not self._is_open and not kwargs and _comes_from_runs(tensors):
                result: Tensor = captured_stack(list(tensors), int(dim), stacked, self._hooks.num_tokens)
                return result
            return original(tensors, dim, **kwargs)

        return collect


def _comes_from_runs(tensors: Any) -> bool:
    """True for a list with one tensor of each run of one loop, in order."""
    if not isinstance(tensors, list | tuple) or len(tensors) != NUM_RUNS:
        return False
    mode = get_proxy_mode()
    if mode is None or not all(isinstance(tensor, Tensor) for tensor in tensors):
        return False
    slots = [get_proxy_slot(tensor, mode.tracer, None) for tensor in tensors]
    runs = [_run_of(slot.proxy.node) for slot in slots if slot is not None]
    found = [run for run in runs if run is not None]
    return [run for _, run in found] == list(builtins.range(NUM_RUNS)) and len({loop for loop, _ in found}) == 1


def _run_of(node: fx.Node) -> tuple[fx.Node, int] | None:
    """The loop, by its first mark, and the run that a node of a graph in the making belongs to; None outside loops."""
    before, run = node, None
    while before.op != "root":
        if before.target == captured_run.overload:
            run = before.args[1] if run is None else run
            if run == -1:
                return None
            if before.args[1] == 0:
                return before, run  # type: ignore[return-value]
        before = before.prev
    return None


def tag_runs(graph: fx.Graph) -> None:
    """Turn the marks into `meta["run"] = (loop, run)` of the nodes between them."""
    loops, run = 0, -1
    for node in list(graph.nodes):
        if node.target == captured_run.overload:
            run = node.args[1]
            loops += run == 0
            graph.erase_node(node)
        elif run != -1 and node.op == "call_function":
            node.meta["run"] = (loops - 1, run)


def _namespaces(model: nn.Module) -> list[dict[str, Any]]:
    """Namespaces of the model's own code: where its classes and functions come from, and the functions these import."""
    names = {cls.__module__ for module in model.modules() for cls in type(module).__mro__}
    attributes = (value for module in model.modules() for value in vars(module).values())
    names |= {value.__module__ for value in attributes if isinstance(value, types.FunctionType)}
    names |= {
        value.__module__
        for name in names
        if name in sys.modules and not name.startswith(_NOT_MODELS)
        for value in list(vars(sys.modules[name]).values())
        if isinstance(value, types.FunctionType)
    }
    own = [name for name in sorted(names) if name in sys.modules and not name.startswith(_NOT_MODELS)]
    return [vars(sys.modules[name]) for name in own]


@contextlib.contextmanager
def _set(namespace: dict[str, Any], name: str, value: object) -> Iterator[None]:
    missing = object()
    before = namespace.get(name, missing)
    namespace[name] = value
    try:
        yield
    finally:
        if before is missing:
            del namespace[name]
        else:
            namespace[name] = before
