"""replay: a small step is written down as it runs, and the next one of the same shape repeats what was written down.

Decoding runs the same few hundred calls every step, with the same sizes at the same addresses but for the batch
inputs. So a step runs under observation when a shape is new and every sequence decodes, else when its shape is seen for
the second time: every native kernel and every torch operator that computes something is put on a tape
(`kernels/cpu/tape.py`), with its buffers; native kernels run when an operator reads what they compute, else at the end,
as one call. From then on the batch inputs are copied to where the tape reads them and the tape runs: no Python between
kernels, one team of threads for all of them. It is what a CUDA graph is on a GPU, and has the same condition: nothing
may depend on a tensor's value in Python. Steps of a shape that read one are never repeated, and the report says so.
"""

import functools
import math
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import _profiler_enabled
from torch.profiler import record_function
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from autodeploy.compile.bind import bind_kernels
from autodeploy.compile.observe import depends_on_values, noticing_reads, storages, tensors
from autodeploy.compile.program import GraphFunction
from autodeploy.graph.model_graph import ModelGraph
from autodeploy.graph.report import BuildReport
from autodeploy.kernels.cpu.native import NativeCall, watching
from autodeploy.kernels.cpu.tape import Tape
from autodeploy.kernels.cpu.torch_calls import compute_natively
from autodeploy.ops.batch_inputs import PAGE_TABLE, is_by_sequence

MAX_TOKENS = 64
"""Tokens of a step up to which it is worth repeating; what larger steps compute hides what Python costs."""
MAX_SHAPES = 96
"""Shapes of steps that are remembered; those longest unused go first."""
REPEATED = "replay"
"""What the name of a repeated step's range in a profiler's trace begins with; the numbers of calls follow."""
LEAST_PAGES = 16
"""Least width of page tables, so that short sequences bring no shapes of their own."""

_MAKES_MEMORY = ("aten::empty", "aten::new_empty", "aten::empty_like", "aten::empty_strided")
_MADE_TO_BE_CHANGED = ("aten::clone", "aten::zeros_like", "aten::ones_like", "aten::full_like", "aten::new_zeros")
_MAX_CONSTANT_BYTES = 16 << 20
"""What follows from weights alone is kept up to this size, and computed anew beyond."""


def compile_replay(graph: ModelGraph, report: BuildReport) -> GraphFunction:
    """A function of the graph's inputs in order that repeats small steps; not for two threads at a time."""
    bind_kernels(graph, keep_opaque=True)
    return Replay(graph.module.forward, graph.batch_inputs(), report)


class Replay:
    """Calls a step's function, or repeats what it did for inputs of the same shapes.

    Args:
        function: one step, of batch inputs and then states.
        batch_inputs: names of the batch inputs.
        report: told, as fact `replay`, why steps cannot be repeated.
    """

    def __init__(self, function: GraphFunction, batch_inputs: Sequence[str], report: BuildReport) -> None:
        self._function, self._batch_inputs, self._report = function, batch_inputs, report
        self._num_tokens_of = batch_inputs.index("input_ids")
        self._by_sequence = next((i for i, name in enumerate(batch_inputs) if is_by_sequence(name)), None)
        self._steps: OrderedDict[tuple[Any, ...], Step | None] = OrderedDict()
        """by the shapes of inputs; None for shapes seen once"""
        self._states: list[int] = []
        self._memory = Memory()

    def __call__(self, *inputs: Tensor) -> Tensor:
        batch, states = inputs[: len(self._batch_inputs)], inputs[len(self._batch_inputs) :]
        if batch[self._num_tokens_of].numel() > MAX_TOKENS:
            return self._function(*inputs)
        addresses = [state.data_ptr() for state in states]
        if addresses != self._states:
            self._steps.clear()
            self._states = addresses
        batch = tuple(_widened(name, value) for name, value in zip(self._batch_inputs, batch, strict=True))
        shapes = tuple(value.shape for value in batch)
        step = self._steps.get(shapes)
        if step is not None:
            self._steps.move_to_end(shapes)
            return self._function(*batch, *states) if step.obstacle else step.run(batch)
        if shapes not in self._steps and not self._decodes(batch):
            self._remember(shapes, None)
            return self._function(*batch, *states)
        step, result = record(self._function, batch, states, self._memory)
        self._remember(shapes, step)
        if step.obstacle:
            num_tokens = batch[self._num_tokens_of].numel()
            self._report.facts["replay"] = f"not for steps of {num_tokens} tokens: {step.obstacle}"
        return result

    def _decodes(self, batch: Sequence[Tensor]) -> bool:
        """Whether every sequence has one token: such a shape comes again, as that of a prompt seldom does."""
        if self._by_sequence is None:
            return False
        return batch[self._num_tokens_of].numel() == batch[self._by_sequence].shape[0]

    def _remember(self, shapes: tuple[Any, ...], step: "Step | None") -> None:
        self._steps[shapes] = step
        self._steps.move_to_end(shapes)
        if len(self._steps) > MAX_SHAPES:
            self._steps.popitem(last=False)


class Step:
    """A step written down.

    Attributes:
        inputs: where the tape reads the batch inputs.
        memory: where it keeps what it computes on the way.
        tape: what to call.
        result: where it puts what the step gives.
        obstacle: why it must not be repeated, or empty.
    """

    def __init__(self, inputs: tuple[Tensor, ...], memory: "Memory") -> None:
        self.inputs, self.memory = inputs, memory
        self.tape = Tape()
        self.result = torch.empty(0)
        self.obstacle = ""
        self.is_in_operator = False

    def forbid(self, reason: str) -> None:
        """The step must not be repeated, as values are read, which are there from now on; the first reason stays."""
        self.tape.catch_up()
        self.obstacle = self.obstacle or reason

    def call(self, call: NativeCall, *arguments: Any) -> int:
        """Write down a native call, to be made later unless values are read in Python; its status."""
        if self.is_in_operator:
            made: int = call.function(*arguments) or 0
            return made
        status = self.tape.add_native(call, *arguments)
        if self.obstacle:
            self.tape.catch_up()
        return status

    def compute(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What an operator gives. Native calls in it are part of it: they are made, and not written down."""
        self.tape.catch_up()
        self.is_in_operator = True
        try:
            return func(*args, **kwargs)
        finally:
            self.is_in_operator = False

    def run(self, batch: Sequence[Tensor]) -> Tensor:
        for mine, given in zip(self.inputs, batch, strict=True):
            mine.copy_(given)
        if _profiler_enabled():  # naming a range costs microseconds
            with record_function(f"{REPEATED}: {self.tape.num_native} native calls, {self.tape.num_python} others"):
                self.tape.run()
        else:
            self.tape.run()
        return self.result.clone()


def record(
    function: GraphFunction, batch: Sequence[Tensor], states: Sequence[Tensor], memory: "Memory"
) -> tuple["Step", Tensor]:
    """Run a step on copies of batch inputs, and on states, and write it down; returns it and what it gave."""
    step = Step(tuple(value.clone() for value in batch), memory)
    with watching(step.call), noticing_reads(step.forbid), _Observer(step, (*step.inputs, *states)):
        step.result = function(*step.inputs, *states)
    step.tape.finish()
    return step, step.result.clone()


class _Observer(TorchDispatchMode):
    """Writes down every operator that computes something; new memory comes from the step's own.

    Args:
        step: where to.
        varying: what differs from step to step: batch inputs and states.
    """

    def __init__(self, step: Step, varying: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._step = step
        self._varying, self._fixed = storages(varying), set[int]()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Not wrapped in what keeps torch.compile out: nothing here calls it, and the wrapper would import all of it at
        the first use, 1.5 seconds of the second token.
        """
        return False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs, memory, facts = kwargs or {}, self._step.memory, _facts(func)
        if facts.makes_memory:
            plain = _plain_memory(facts.name, args, kwargs)
            made = memory.like(func(*args, **kwargs)) if plain is None else memory.empty(*plain)
            self._varying |= storages([made])
            return made
        if facts.is_view:
            result = func(*args, **kwargs)
            if _shares_memory(result, args[0]):
                return result
        result = self._step.compute(func, args, kwargs)
        given, results = tensors((args, kwargs)), tensors(result)
        if depends_on_values(func, given):
            self._step.forbid(f"{func} gives what depends on values")
        old, new = storages(given), storages(results)
        if facts.is_mutable:
            self._note_change(func, args, kwargs)
        elif new <= old:
            return result
        elif self._is_constant(facts, old, results):
            self._fixed |= old | new
            return memory.constant((str(func), *map(_identity, tree_leaves(args)), *kwargs), given, result)
        elif not new & old:
            own = [memory.like(value) for value in results]
            self._varying |= storages(own)
            if compute_natively(func, args, kwargs, own):
                return own[0] if isinstance(result, Tensor) else type(result)(own)
        self._varying |= new
        self._step.tape.add_python(_repeat(func, args, kwargs, results))
        return result

    def _is_constant(self, facts: "_Facts", given: set[int], results: Sequence[Tensor]) -> bool:
        """Whether results follow from weights alone, and are small enough to be kept."""
        if not given or given & self._varying or facts.is_made_to_be_changed:
            return False
        return sum(value.untyped_storage().nbytes() for value in results) <= _MAX_CONSTANT_BYTES

    def _note_change(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        """What an operator changes in place differs from step to step, and must not have counted as constant."""
        named = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False)) | kwargs
        changed = storages(
            tensors([named.get(argument.name) for argument in func._schema.arguments if argument.is_write])
        )
        self._varying |= changed
        if changed & self._fixed:
            self._step.forbid(f"{func} changes what other operators took for constant")


@dataclass(frozen=True, kw_only=True)
class _Facts:
    """What there is to know of an operator."""

    name: str
    is_view: bool
    is_mutable: bool
    makes_memory: bool
    is_made_to_be_changed: bool


@functools.cache
def _facts(func: Any) -> _Facts:
    """Looked up once per operator: a step calls a thousand."""
    name = func._schema.name
    return _Facts(
        name=name,
        is_view=func.is_view,
        is_mutable=func._schema.is_mutable,
        makes_memory=name in _MAKES_MEMORY,
        is_made_to_be_changed=name in _MADE_TO_BE_CHANGED,
    )


def _plain_memory(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[int, ...], torch.dtype] | None:
    """Shape and dtype of the contiguous tensor that kernels most often ask for; None where it may be another one.

    Calling the operator to see would take most of the time that writing down an allocation does.
    """
    if name not in ("aten::new_empty", "aten::empty_like"):
        return None
    given: Tensor = args[0]
    if kwargs.keys() - {"dtype", "pin_memory"} or kwargs.get("pin_memory") or given.device.type != "cpu":
        return None
    dtype = kwargs.get("dtype") or given.dtype
    if name == "aten::new_empty":
        return tuple(args[1]), dtype
    return (given.shape, dtype) if given.is_contiguous() else None


def _shares_memory(result: Any, given: Any) -> bool:
    """Whether what an operator for views gives lies where the tensor that it was given does; else it made a copy."""
    first = result if isinstance(result, Tensor) else next(iter(result), None)
    if not isinstance(first, Tensor) or not isinstance(given, Tensor):
        return False
    return bool(first.untyped_storage()._cdata == given.untyped_storage()._cdata)


def _identity(value: Any) -> Any:
    """What an argument is told apart by: a tensor by where and how it lies."""
    return (value.data_ptr(), value.shape, value.stride(), value.dtype) if isinstance(value, Tensor) else value


def _repeat(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], results: Sequence[Tensor]) -> Callable[[], None]:
    """A function that calls an operator again and puts what it gives where it was put before."""

    def repeat() -> None:
        again = func(*args, **kwargs)
        for kept, new in zip(results, tensors(again), strict=True):
            if kept is not new and kept.data_ptr() != new.data_ptr():
                kept.copy_(new)

    return repeat


class Memory:
    """Buffers for what steps compute on the way, and what they all compute alike. A step repeats its calls in order, so
    that a buffer that was free at a call when the step was written down is free there whenever it is repeated; and
    steps do not overlap.
    """

    def __init__(self) -> None:
        self._buffers: list[tuple[int, int, torch.UntypedStorage]] = []
        """size in bytes, number and memory of each; smallest first"""
        self._constants: dict[Any, tuple[Sequence[Tensor], Any]] = {}

    def like(self, wanted: Tensor) -> Tensor:
        """An uninitialised tensor like the given one, or that itself."""
        storage = wanted.untyped_storage()
        buffer = self._free(storage.nbytes())
        if buffer is None:
            self._keep(storage)
            return wanted
        return torch.empty(0, dtype=wanted.dtype).set_(buffer, 0, wanted.shape, wanted.stride())

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """An uninitialised, contiguous tensor."""
        buffer = self._free(math.prod(shape) * dtype.itemsize)
        if buffer is None:
            made = torch.empty(shape, dtype=dtype)
            self._keep(made.untyped_storage())
            return made
        return torch.empty(0, dtype=dtype).set_(buffer, 0, shape, ())  # without strides: contiguous

    def _free(self, size: int) -> torch.UntypedStorage | None:
        """The smallest buffer of at least this size in bytes that nobody holds."""
        for i in range(bisect_left(self._buffers, (size,)), len(self._buffers)):
            buffer = self._buffers[i][2]
            if _num_users(buffer) == 1:
                return buffer
        return None

    def _keep(self, buffer: torch.UntypedStorage) -> None:
        insort(self._buffers, (buffer.nbytes(), len(self._buffers), buffer))

    def constant(self, key: Any, given: Sequence[Tensor], result: Any) -> Any:
        """The result of an operator that gives the same in every step; what it was given stays where it is."""
        return self._constants.setdefault(key, (given, result))[1]


def _num_users(storage: torch.UntypedStorage) -> int:
    return int(torch._C._storage_Use_Count(storage._cdata))


def _widened(name: str, value: Tensor) -> Tensor:
    """A page table as wide as the next power of two, so that its shape seldom changes; anything else as it is."""
    if not name.startswith(PAGE_TABLE):
        return value
    width = max(LEAST_PAGES, 1 << (value.shape[1] - 1).bit_length())
    return value if width == value.shape[1] else torch.nn.functional.pad(value, (0, width - value.shape[1]))
