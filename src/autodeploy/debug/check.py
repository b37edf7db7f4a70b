"""check(model): every step of a build against the model's own code; errors come out as a table, and who is to blame.

A tiny clone of the model goes through the pipeline as a build would run it. After each transform the graph runs in
every way it can by then (each sequence alone, packed, in chunks, token by token), and its logits are compared with
those of the graph before. The first transform that moves them further than it says it may is named, with the node, the
module and the source line.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn

from autodeploy.build import resolve_device
from autodeploy.capture.export import capture
from autodeploy.checkpoint.index import ModuleReader
from autodeploy.checkpoint.load import load_weights
from autodeploy.compile.backends import compile_graph, resolve_backend
from autodeploy.compile.program import Progress
from autodeploy.config import Options
from autodeploy.debug.backend_runs import BackendRun, compared_backends, run_backend
from autodeploy.debug.check_report import FAILED, INCONCLUSIVE, PASSED, CheckReport, CheckRow
from autodeploy.debug.clone import Clone, logits_of, tiny_clone
from autodeploy.debug.compare import difference, relative_error
from autodeploy.debug.first_difference import describe, first_difference, new_inputs
from autodeploy.debug.full_check import full_check
from autodeploy.debug.full_report import FullReport
from autodeploy.debug.graph_run import (
    GraphRun,
    Schedule,
    Weights,
    alone,
    chunks,
    packed,
    run_function,
    run_graph,
    token_by_token,
)
from autodeploy.debug.isolation import QUANTIZED_TOLERANCE
from autodeploy.errors import AutoDeployError, ConfigError
from autodeploy.graph.levels import Level
from autodeploy.graph.model_graph import ModelGraph
from autodeploy.graph.report import BuildReport, TransformReport
from autodeploy.graph.transform import Stage, Transform
from autodeploy.graph.verify import verify
from autodeploy.kernels.provider import prepare
from autodeploy.ops.attention import is_float8
from autodeploy.transforms.lower.select_kernels import SelectKernels
from autodeploy.transforms.pipeline import configure, default_pipeline, kernel_choice

LENGTHS = (7, 1, 16)
"""tokens of the sequences that every graph is run on"""

ALONE = "alone"
_NOTE_ON_LOOPS = (
    "a loop over tokens is three traced runs of its body here, and runs once it is rolled; what that gives is compared"
    " with what the graph before these gave, or the model's own code"
)


@overload
def check(
    model: str | nn.Module,
    options: Options | None = None,
    *,
    progress: Progress | None = None,
    full: Literal[False] = False,
) -> CheckReport: ...


@overload
def check(
    model: str | nn.Module,
    options: Options | None = None,
    *,
    progress: Progress | None = None,
    full: Literal[True],
    **texts: Any,
) -> FullReport: ...


def check(
    model: str | nn.Module,
    options: Options | None = None,
    *,
    progress: Progress | None = None,
    full: bool = False,
    **texts: Any,
) -> CheckReport | FullReport:
    """Check a build of a tiny clone of the model, step by step; with `full`, the real build on a few prompts.

    Args:
        model: as for `build`. A module of few parameters is taken as it is, with its own weights.
        options: as for `build`; numbers are float32 unless `dtype` says otherwise.
        progress: called with one line when a step begins.
        full: compare the real weights in the real build with transformers' own run of them, as `full_check` does.
        texts: with `full`, `prompts`, `max_tokens` and `perplexity` of `full_check`.
    Raises:
        ConfigError: options that do not go together. ModelNotFoundError, CheckpointError: no such model.
    """
    if full:
        return full_check(model, options, progress=progress, **texts)
    if texts:
        raise ConfigError(f"{', '.join(sorted(texts))}: a check of a tiny clone has no texts; pass full=True")
    options = options or Options()
    progress = progress or (lambda _: None)
    progress("making a tiny clone")
    clone = tiny_clone(model, options.model)
    report = CheckReport(facts=dict(clone.facts))
    with _one_thread(), contextlib.suppress(_Stopped):
        _Check(clone, options, report, progress).run()
    return report


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """Tensors of a tiny model are not worth a second thread, which costs much where other processes compute."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Stopped(Exception):
    """A row failed in a way that leaves nothing to go on with."""


class _Check:
    """One check: the graph as it is now, and what the graph before gave."""

    def __init__(self, clone: Clone, options: Options, report: CheckReport, progress: Progress):
        self.clone, self.options, self.report, self.progress = clone, options, report, progress
        self.device = resolve_device(options.compile.device)
        self.weights = Weights(ModuleReader(clone.module).read)
        self.tolerance = Transform.tolerance[clone.dtype]
        self.calls: dict[str, str] = {}
        """node name -> what it calls"""
        self.known: frozenset[str] = frozenset()
        """names of the nodes before the transform that ran last"""
        self.made_by: dict[str, str] = {}
        """node name -> the transform that made or changed it last"""

    def run(self) -> None:
        self._capture()
        prepare(self.device, self.progress)
        kernels = kernel_choice(self.device, self.options.compile)
        for stage in configure(default_pipeline(self.device, kernels), self.options.compile).stages:
            self._stage(stage)
        self._compile()
        self._compare_backends()

    def _capture(self) -> None:
        self.progress("capture")
        with self._failing("capture", "capture"):
            self.graph = capture(self.clone.module)
            verify(self.graph, Level.CAPTURED)
            self.rows = _random_rows(min(_logits_width(self.graph), self.clone.vocab_size or 2**31))
            self.original = logits_of(self.clone.exact, self.rows)
            self.before = {ALONE: GraphRun(logits_of(self.clone.module, self.rows), {})}
        self._track("capture")
        self._compare("capture", "capture", None, self.tolerance)

    def _stage(self, stage: Stage) -> None:
        reports = iter(stage.run(self.graph))
        for transform in [transform for transform in stage.transforms if transform.enabled]:
            name = transform.name()
            self.progress(f"{stage.name}: {name}")
            with self._failing(stage.name, name):
                report = next(reports)
            self._track(name)
            self._compare(stage.name, name, report, self._allowed(transform.tolerance[self.clone.dtype]))
        was_canonical = self.graph.level >= Level.CANONICAL
        with self._failing(stage.name, "level"):
            next(reports, None)  # verifies the level
        if self.graph.level >= Level.CANONICAL and not was_canonical:
            self._check_packing(stage.name)

    def _ways(self) -> dict[str, Schedule]:
        """The ways in which the graph can be run by now."""
        ways = {ALONE: alone(self.rows)}
        if self.graph.level >= Level.CANONICAL:
            ways["packed"] = packed(self.rows)
            if all(op.states is None for _, op in self.graph.op_nodes()):
                ways |= {"in chunks": chunks(self.rows), "token by token": token_by_token(self.rows)}
        return ways

    def _allowed(self, tolerance: float) -> float:
        """The tolerance, and no less than what a value on the border of two levels makes, where there are levels."""
        rounds = any(op.rounds_activations for _, op in self.graph.op_nodes())
        rounds = rounds or any(is_float8(spec.dtype) for spec in self.graph.states)
        return max(tolerance, QUANTIZED_TOLERANCE) if rounds else tolerance

    def _compare(self, stage: str, name: str, transform: TransformReport | None, tolerance: float) -> None:
        """Run the graph in every way, compare with the graph before, and remember what it gave."""
        if any("run" in node.meta for node in self.graph.graph.nodes):
            self._row(stage, name, transform, verdict=INCONCLUSIVE, note=_NOTE_ON_LOOPS)
            return
        runs: dict[str, GraphRun] = {}
        with self._failing(stage, name, transform):
            for way, schedule in self._ways().items():
                runs[way] = run_graph(self.graph, self.weights, self.rows, schedule)
        logits = {way: run.logits for way, run in runs.items()}
        self._judge(stage, name, logits, tolerance, transform, lambda way: self._blame(way, runs[way], tolerance))
        self.before = runs

    def _expected(self, way: str) -> GraphRun:
        """What the graph before gave when it was run in the same way, or alone where it could not be."""
        return self.before.get(way, self.before[ALONE])

    def _judge(
        self,
        stage: str,
        name: str,
        logits: dict[str, Tensor],
        tolerance: float,
        transform: TransformReport | None,
        blame: Callable[[str], str],
    ) -> None:
        """Add a row that compares what each way of running gave with what the graph before gave."""
        errors = {way: relative_error(result, self._expected(way).logits) for way, result in logits.items()}
        worst = max(errors, key=lambda way: errors[way])
        wrong = [way for way in errors if errors[way] > tolerance]
        self._row(
            stage, name, transform,
            error=errors[worst],
            tolerance=tolerance,
            against_original=difference(logits[worst], self.original),
            verdict=FAILED if wrong else PASSED,
            # What shows when a sequence is alone shows in every other way too, and is easiest to follow there.
            note=f"{wrong[0]}: {blame(wrong[0])}" if wrong else "",
        )  # fmt: skip

    def _check_packing(self, stage: str) -> None:
        """Sequences in one row must give what each gives alone; joining them must not, or the comparison is empty."""
        joined_row = [torch.cat(self.rows)]
        with self._failing(stage, "packing"):
            together = run_graph(self.graph, self.weights, self.rows, packed(self.rows))
            joined = run_graph(self.graph, self.weights, joined_row, packed(joined_row))
        self.known = frozenset(self.calls)
        blame = lambda way: self._blame(way, together, self.tolerance)  # noqa: E731
        self._judge(stage, "packing", {"packed": together.logits}, self.tolerance, None, blame)
        if relative_error(joined.logits, self.before[ALONE].logits) <= self.tolerance:
            note = "joining the sequences into one changed nothing either"
            self.report.rows[-1] = dataclasses.replace(self.report.rows[-1], verdict=INCONCLUSIVE, note=note)

    def _compile(self) -> None:
        backend = resolve_backend(self.options.compile.compile_backend, self.device)
        self.progress(f"compile: {backend}")
        self.report.facts |= {"compile_backend": backend, "lowered_nodes": len(self.graph.graph.nodes)}
        logits: dict[str, Tensor] = {}
        tolerance = self._allowed(SelectKernels.tolerance[self.clone.dtype])  # before nodes are bound to kernels
        self._allowed_of_kernels = tolerance
        with self._failing("compile", backend):
            for name, tensor in load_weights(self.graph.weights, self.weights.read, device=self.device).items():
                setattr(self.graph.module, name, nn.Parameter(tensor, requires_grad=False))
            ways = self._ways()  # before nodes are bound to kernels
            function = compile_graph(self.graph, backend, self.device, BuildReport())
            for way, schedule in ways.items():
                logits[way] = run_function(function, self.graph, self.rows, schedule, self.device)
        self._judge(
            "compile", backend, logits, tolerance, None,
            lambda _: "the compiled graph gives other logits than its nodes one by one",
        )  # fmt: skip

    def _compare_backends(self) -> None:
        """Generate by each backend of the device: the first chooses the tokens, the others are to choose the same."""
        measure: BackendRun | None = None
        if self.options.compile.batch_invariant:
            return  # which has one backend
        for backend in compared_backends(self.device):
            self.progress(f"generate: {backend}")
            shown = None if measure is None else measure.token_ids
            with self._failing("generate", backend):
                run = run_backend(self.clone.module, self.options.compile, backend, self.rows, shown)
            measure = measure or run
            error = relative_error(run.logits, measure.logits)
            tolerance = self._allowed_of_kernels
            is_wrong = error > tolerance or run.chooses_otherwise
            verdict = FAILED if is_wrong else INCONCLUSIVE if run.is_partly_unseen else PASSED
            note = run.described(measure)
            self._row("generate", backend, error=error, tolerance=tolerance, verdict=verdict, note=note)

    def _blame(self, way: str, found: GraphRun, tolerance: float) -> str:
        """Where a run first parts from the graph before, and which transform changed that place last."""
        node = first_difference(self.graph, found, self._expected(way), tolerance)
        made = new_inputs(node, self.known)
        changed = [self.made_by[other.name] for other in (node, *made)]
        by = "as the model wrote it" if changed[-1] == "capture" else f"last changed by {changed[-1]}"
        return f"first seen at {describe(node, made)}; {by}"

    def _track(self, transform: str) -> None:
        """Note which nodes a transform made or changed."""
        calls = {
            node.name: f"{node.target} {node.args} {node.kwargs} {node.meta.get('provider')}"
            for node in self.graph.graph.nodes
        }
        self.made_by |= {name: transform for name, call in calls.items() if self.calls.get(name) != call}
        self.known, self.calls = frozenset(self.calls), calls

    def _row(self, stage: str, name: str, transform: TransformReport | None = None, **found: Any) -> None:
        self.report.rows.append(CheckRow(stage=stage, name=name, transform=transform, **found))

    @contextlib.contextmanager
    def _failing(self, stage: str, name: str, transform: TransformReport | None = None) -> Iterator[None]:
        """Whatever goes wrong inside is a failed row, and the end: there is no graph to go on with."""
        try:
            yield
        except AutoDeployError as error:
            self._row(stage, name, transform, verdict=FAILED, note=str(error))
            raise _Stopped from error
        except Exception as error:  # a wrong graph fails in its own way: a shape, a dtype, an index
            note = f"the graph does not run: {type(error).__name__}: {error}"
            self._row(stage, name, transform, verdict=FAILED, note=note)
            raise _Stopped from error


def _random_rows(vocab_size: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, vocab_size, (length,), generator=generator) for length in LENGTHS]


def _logits_width(graph: ModelGraph) -> int:
    (logits,) = graph.graph.output_node().args
    return int(logits.meta["val"].shape[-1])  # type: ignore[union-attr]
