"""Watch: a model goes in; its program comes out, later the steps that it served, and the calls of its graph."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from torch import Tensor, nn
from torch.profiler import record_function

from autodeploy.bench.profile.op_by_op import OpByOp
from autodeploy.build import build
from autodeploy.compile.program import Program
from autodeploy.config import Options
from autodeploy.debug.costs import Step
from autodeploy.graph.model_graph import ModelGraph

STEP = "step"
"""Name of a served step's range in the trace."""
GRAPH = "text"
_Result = TypeVar("_Result")


@dataclass(frozen=True)
class ServedStep:
    """A step that the program ran.

    Attributes:
        inputs: by name; batch inputs are copies, states are the engine's own. Empty where nothing was copied.
        begin, end: seconds of the clock `time.perf_counter`; on CUDA it only launches in between.
    """

    inputs: dict[str, Tensor]
    begin: float
    end: float

    @property
    def size(self) -> Step:
        """Tokens, sequences and context, as far as the graph reads them."""
        num_tokens = self.inputs["input_ids"].numel()
        wanted = self.inputs.get("logits_indices")
        rows = num_tokens if wanted is None else wanted.numel()
        if "seq_lens" not in self.inputs:  # then nothing depends on how long a context is
            by_sequence = self.inputs.get("state_slots")
            count = 1 if by_sequence is None else by_sequence.numel()
            return Step(tokens=num_tokens, sequences=count, context=0, keys=0, rows=rows)
        contexts = self.inputs["seq_lens"].tolist()
        bounds = self.inputs["cu_seqlens"].tolist() if "cu_seqlens" in self.inputs else range(num_tokens + 1)
        keys = 0.0
        for context, begin, end in zip(contexts, bounds, bounds[1:], strict=False):
            count = end - begin
            keys += count * (context - (count - 1) / 2)  # its last token sees all, the one before one less
        return Step(
            tokens=num_tokens,
            sequences=len(contexts),
            context=round(sum(contexts) / len(contexts)),
            keys=keys / num_tokens,
            rows=rows,
        )

    @property
    def decodes(self) -> bool:
        """Whether every sequence has one token."""
        return self.size.tokens == self.size.sequences


class Watch:
    """Builds a program and sees what it serves.

    Attributes:
        steps: what was served while `is_recording`.
        is_copying: keep their inputs too, which takes time on the device between steps.
    """

    def __init__(self) -> None:
        self.steps: list[ServedStep] = []
        self.is_recording = self.is_copying = False
        self._ops: OpByOp | None = None

    @property
    def ops(self) -> OpByOp:
        """The calls of the program's graph."""
        assert self._ops is not None, "build first"
        return self._ops

    def build(self, model: str | nn.Module, options: Options) -> Program:
        """`build`, of a program whose steps are seen."""
        program = build(model, options, lowered=self._keep)
        graph = program.graphs[GRAPH]
        self._num_batch_inputs, self._names = len(graph.batch_inputs), (*graph.batch_inputs, *graph.state_names)
        function, choosing = graph.function, graph.run_and_choose
        seen = replace(graph, function=lambda *inputs: self._seen(function, inputs))
        if choosing is not None:
            seen = replace(seen, run_and_choose=lambda draws, *inputs: self._seen(partial(choosing, draws), inputs))
        return replace(program, graphs={**program.graphs, GRAPH: seen})

    def _keep(self, graph: ModelGraph) -> None:
        """Take note of a graph before a backend changes it."""
        if graph.name == GRAPH:
            self._ops = OpByOp(graph)

    def _seen(self, function: Callable[..., _Result], inputs: Sequence[Tensor]) -> _Result:
        if not self.is_recording:
            return function(*inputs)
        kept: dict[str, Tensor] = {}
        if self.is_copying:
            copies = [value.clone() for value in inputs[: self._num_batch_inputs]]
            kept = dict(zip(self._names, [*copies, *inputs[self._num_batch_inputs :]], strict=True))
        with record_function(STEP):
            begin = time.perf_counter()
            result = function(*inputs)
            end = time.perf_counter()
        self.steps.append(ServedStep(kept, begin, end))
        return result
