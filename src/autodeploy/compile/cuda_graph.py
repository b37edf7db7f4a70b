"""torch-cudagraph, torch-opt: steps are captured once for a few sizes, and repeated as one launch, or a few.

A step in which every sequence brings one token is captured whole, for numbers of sequences; any other up to a number of
tokens is captured in pieces (`piecewise.py`), the regions of `segments.py`, and what stands between them runs as it is.
Batches are padded to the next size (`static_batch.py`). All graphs share one pool of memory and are captured largest
first, when the runtime has its states (`Program.prepare`). Larger steps, and steps over other states, run call by call.
Whole steps choose their tokens too (`graphed_choice.py`).
"""

import contextlib
import functools
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from autodeploy.compile.bind import bind_kernels
from autodeploy.compile.capture import Capture
from autodeploy.compile.capture_sizes import CaptureSizes
from autodeploy.compile.graphed_choice import GraphedChoice, why_not_chosen
from autodeploy.compile.piecewise import PiecewiseGraphs
from autodeploy.compile.program import BatchLimits, ChooseTokens, Chosen, Draws, Progress
from autodeploy.compile.segments import CompileRegion, Cut, Segments
from autodeploy.compile.static_batch import StaticInput
from autodeploy.compile.streams import Branches, Streams
from autodeploy.compile.whole_graphs import WholeGraphs
from autodeploy.graph.model_graph import ModelGraph
from autodeploy.graph.report import BuildReport
from autodeploy.ops.batch_inputs import is_by_sequence
from autodeploy.ops.state import PagedState, StateSpec
from autodeploy.start_up import without_collection

logger = logging.getLogger(__name__)

FACT = "cuda_graphs"
"""Fact of the report: by graph, what was captured, and how many steps and tokens ran in graphs or why not."""
WHOLE, PIECES = "whole", "in pieces"
NOT_PREPARED = "no graphs: not captured for these states"
ALL_LOGITS = "the graph gives a row of logits for every token, wanted or not"
IN_GRAPH = "in the graph"
NOT_WHOLE = "behind the step: it was no whole graph"
LOOKED_AT = "behind the step: a row has penalties or constraints"
_Step = Callable[[], tuple[Tensor, Chosen | None]]


def compile_cuda_graph(
    graph: ModelGraph,
    device: torch.device,
    report: BuildReport,
    new_capture: Callable[[], Capture],
    sizes: Sequence[int] | None = None,
    compile_region: CompileRegion | None = None,
    streams: Streams | None = None,
    choose: ChooseTokens | None = None,
) -> "GraphedFunction":
    """A function of the graph's inputs in order that repeats captured steps once it is prepared.

    Args:
        report: told, as fact `cuda_graphs`, what was captured and what ran in graphs.
        new_capture: who captures, anew for each preparation.
        sizes: numbers of tokens to capture; default: see `CaptureSizes`.
        compile_region: compiles regions before they are captured; default: they run node by node.
        streams: for the graph's marked branches, if whole steps are faster with it.
        choose: kernel that chooses tokens from the logits of whole steps, in their graphs.
    """
    branches = None if streams is None else Branches(graph, streams)
    cut = Cut(graph)
    is_compiled = compile_region is not None
    bind_kernels(graph, keep_opaque=is_compiled, keep_kernels=is_compiled)
    segments = cut.segments(compile_region)
    return GraphedFunction(graph, segments, device, report, new_capture, sizes, branches, choose)


@dataclass
class _Graphs:
    """What was captured for some states.

    Attributes:
        states: those states, in order.
        sizes: what was captured for.
        whole, pieces: graphs of whole steps, and of steps in pieces; None where there are none.
        why_not: reasons, by `WHOLE` and `PIECES`.
    """

    states: list[Tensor]
    sizes: CaptureSizes
    whole: WholeGraphs | None = None
    pieces: PiecewiseGraphs | None = None
    why_not: dict[str, str] = field(default_factory=dict)


class GraphedFunction:
    """Runs a step by graphs if there are some that fit it, else call by call; not for two threads at a time.

    It is the `Preparation` of its graph too. See `compile_cuda_graph` for the arguments.
    """

    def __init__(
        self,
        graph: ModelGraph,
        segments: Segments,
        device: torch.device,
        report: BuildReport,
        new_capture: Callable[[], Capture],
        sizes: Sequence[int] | None,
        branches: Branches | None,
        choose: ChooseTokens | None,
    ) -> None:
        self._segments, self._new_capture, self._wanted_sizes = segments, new_capture, sizes
        self._branches = branches
        placeholders = {str(node.target): node.meta["val"] for node in graph.inputs()}
        self._specs = graph.states
        self._inputs = [StaticInput.of(name, placeholders[name]) for name in graph.batch_inputs()]
        self._names = [str(node.target) for node in graph.inputs()]
        self._batch_names = list(graph.batch_inputs())
        self._by_sequence = next(filter(is_by_sequence, self._batch_names), None)
        (logits,) = graph.graph.output_node().args
        self._vocab_size = int(logits.meta["val"].shape[-1])  # type: ignore[union-attr]
        self._device = device
        self._graphs: _Graphs | None = None
        self._facts: dict[str, Any] = report.facts.setdefault(FACT, {}).setdefault(graph.name, {})
        why_not = why_not_chosen(choose, self._batch_names)
        self._choose = choose if why_not is None else None
        self._facts |= {"steps": {}, "tokens": {}, "choice": why_not or IN_GRAPH, "chosen": {}}

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self._step(inputs, None)[0]

    @property
    def chooses_tokens(self) -> bool:
        """Whether graphs of whole steps do."""
        return self._choose is not None

    def run_and_choose(self, draws: Draws | None, *inputs: Tensor) -> tuple[Tensor, Chosen | None]:
        """As `Program.run_and_choose` says: whole steps choose, others do not."""
        logits, chosen = self._step(inputs, draws)
        where = IN_GRAPH if chosen is not None else NOT_WHOLE if draws is not None else LOOKED_AT
        self._facts["chosen"][where] = self._facts["chosen"].get(where, 0) + 1
        return logits, chosen

    def _step(self, inputs: Sequence[Tensor], draws: Draws | None) -> tuple[Tensor, Chosen | None]:
        values = dict(zip(self._names, inputs, strict=True))
        num_tokens = values["input_ids"].numel()
        how, step = self._way(values, num_tokens, draws)
        self._count(how, num_tokens)
        return step()

    @torch.inference_mode()
    def prepare(self, states: Mapping[str, Tensor], limits: BatchLimits, progress: Progress) -> None:
        began = time.perf_counter()
        self._graphs = None  # its memory is given back before more is taken
        sizes = self._sizes(limits)
        progress(f"capturing CUDA graphs for {len(sizes.sequences)} batch sizes and {len(sizes.tokens)} token counts")
        capture = self._new_capture()
        used = capture.used_bytes()
        graphs = self._new_graphs(states, limits, sizes)
        self._capture(graphs, sizes, capture)
        self._graphs = graphs
        self._facts |= {
            "whole_sizes": sorted(sizes.sequences) if graphs.whole is not None else [],
            "piece_sizes": sorted(sizes.tokens) if graphs.pieces is not None else [],
            "not_captured": graphs.why_not,
            "bytes": max(0, capture.used_bytes() - used),
            "capture_seconds": time.perf_counter() - began,
            "streams": graphs.whole.on_streams if graphs.whole is not None else {},
            "steps": {},  # counted anew: what ran before had no graphs to run in
            "tokens": {},
            "chosen": {},
        }
        for what, why in graphs.why_not.items():
            logger.warning("no CUDA graphs of steps %s: %s", what, why)
        logger.info(
            "CUDA graphs of %d batch sizes and %d token counts take %d bytes",
            *(len(sizes.sequences), len(sizes.tokens), self._facts["bytes"]),
        )

    @torch.inference_mode()
    def reserved_bytes(self, limits: BatchLimits) -> int:
        """As `Preparation` says: graphs of the two largest sizes are captured over states of one page. What the first
        takes all share; what the second takes each further one will.
        """
        sizes = self._sizes(limits)
        capture = self._new_capture()
        used = [capture.used_bytes()]
        graphs = self._new_graphs(_scratch_states(self._specs, limits.page_size, self._device), limits, sizes)
        for number in range(2):
            some = CaptureSizes(sizes.sequences[number : number + 1], sizes.tokens[number : number + 1])
            self._capture(graphs, some, capture)
            used.append(capture.used_bytes())
        num_further = max(0, max(len(sizes.sequences), len(sizes.tokens)) - 1)
        reserved = max(0, used[1] - used[0]) + max(0, used[2] - used[1]) * num_further
        self._facts["reserved_bytes"] = reserved
        del graphs
        capture.used_bytes()  # what the trial took is given back, before anybody looks at what is free
        return reserved

    def _sizes(self, limits: BatchLimits) -> CaptureSizes:
        return CaptureSizes.of(self._wanted_sizes, limits, has_whole_steps=self._why_not_whole() is None)

    def _why_not_whole(self) -> str | None:
        if self._segments.unsafe:
            return f"not capture-safe: {', '.join(self._segments.unsafe)}"
        return None if "logits_indices" in self._batch_names else ALL_LOGITS

    def _new_graphs(self, states: Mapping[str, Tensor], limits: BatchLimits, sizes: CaptureSizes) -> _Graphs:
        """Room for graphs, none of which is captured yet."""
        graphs = _Graphs([states[spec.name] for spec in self._specs], sizes)
        own = {spec.name: states[spec.name] for spec in self._specs}
        step = (self._segments, self._inputs, own, limits)
        traits: dict[str, Any] = {"vocab_size": self._vocab_size, "device": self._device}
        if (why := self._why_not_whole()) is not None:
            graphs.why_not[WHOLE] = why
        elif sizes.sequences:
            most = max(sizes.sequences)
            choice = None if self._choose is None else GraphedChoice(self._choose, most, self._device)
            graphs.whole = WholeGraphs(*step, max_sequences=most, choice=choice, branches=self._branches, **traits)
        if sizes.tokens:
            with _noting(graphs.why_not, PIECES):
                graphs.pieces = PiecewiseGraphs(*step, max_tokens=max(sizes.tokens), **traits)
        return graphs

    def _capture(self, graphs: _Graphs, sizes: CaptureSizes, capture: Capture) -> None:
        """Capture graphs of some sizes. Where one cannot be captured, none of its kind is used."""
        with without_collection():
            for kind, counts in ((PIECES, sizes.tokens), (WHOLE, sizes.sequences)):
                kept = graphs.pieces if kind == PIECES else graphs.whole
                if kept is None:
                    continue
                with _noting(graphs.why_not, kind):
                    for count in counts:
                        kept.capture(count, capture)
        if PIECES in graphs.why_not:
            graphs.pieces = None
        if WHOLE in graphs.why_not:
            graphs.whole = None

    def _way(self, values: Mapping[str, Tensor], num_tokens: int, draws: Draws | None) -> tuple[str, _Step]:
        """How a step runs, and what runs it."""
        graphs = self._graphs
        call_by_call = functools.partial(_without_choice, self._segments.run, values)
        if graphs is None or any(values[s.name] is not t for s, t in zip(self._specs, graphs.states, strict=True)):
            return NOT_PREPARED, call_by_call
        whole, pieces = graphs.whole, graphs.pieces
        batch = {name: values[name] for name in self._batch_names}
        size = graphs.sizes.of_sequences(num_tokens)
        if whole is not None and size is not None and self._decodes(batch, size):
            if draws is not None and self._choose is not None:
                return WHOLE, functools.partial(whole.run_and_choose, size, batch, draws)
            return WHOLE, functools.partial(_without_choice, whole.run, size, batch)
        size = graphs.sizes.of_tokens(num_tokens)
        if pieces is not None and size is not None:
            return PIECES, functools.partial(_without_choice, pieces.run, size, batch)
        if pieces is None:
            return f"no graphs: {graphs.why_not.get(PIECES, 'no size is captured')}", call_by_call
        return f"no graphs: more than {graphs.sizes.most_tokens} tokens", call_by_call

    def _decodes(self, batch: Mapping[str, Tensor], size: int) -> bool:
        """Whether every sequence brings one token, and no more rows of logits are wanted than there is room for."""
        num_tokens = batch["input_ids"].numel()
        num_sequences = num_tokens if self._by_sequence is None else batch[self._by_sequence].shape[0]
        return num_tokens == num_sequences and batch["logits_indices"].numel() <= size

    def _count(self, how: str, num_tokens: int) -> None:
        steps, tokens = self._facts["steps"], self._facts["tokens"]
        steps[how] = steps.get(how, 0) + 1
        tokens[how] = tokens.get(how, 0) + num_tokens


def _without_choice(run: Callable[..., Tensor], *arguments: Any) -> tuple[Tensor, None]:
    return run(*arguments), None


@contextlib.contextmanager
def _noting(reasons: dict[str, str], kind: str) -> Iterator[None]:
    """A failed capture is a reason to do without, and no more."""
    try:
        yield
    except RuntimeError as error:
        reasons[kind] = str(error).splitlines()[0]


def _scratch_states(specs: Sequence[StateSpec], page_size: int, device: torch.device) -> dict[str, Tensor]:
    """States of nothing but the scratch page and the scratch slot."""
    return {
        spec.name: torch.zeros(
            *((1, page_size) if isinstance(spec, PagedState) else (1,)), *spec.shape, dtype=spec.dtype, device=device
        )
        for spec in specs
    }
