"""inspect: what a build makes of a model, without reading its weights: graphs as text, and everything for the page."""

import dataclasses
import difflib
import math
import re
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from autodeploy.build import resolve_device
from autodeploy.capture.export import capture
from autodeploy.checkpoint.load import weight_bytes
from autodeploy.checkpoint.recipe import Concat, Source
from autodeploy.compile.backends import resolve_backend
from autodeploy.compile.program import Progress
from autodeploy.config import Options
from autodeploy.debug.costs import Cost, node_cost
from autodeploy.debug.layers import LayerKind, layer_kinds, place
from autodeploy.errors import ConfigError
from autodeploy.graph.levels import Level
from autodeploy.graph.model_graph import ModelGraph, source_line
from autodeploy.graph.report import BuildReport, TransformReport
from autodeploy.graph.text import graph_text as text_of
from autodeploy.graph.text import node_text
from autodeploy.graph.transform import Pipeline
from autodeploy.graph.verify import verify
from autodeploy.models.instantiate import instantiate
from autodeploy.models.resolve import resolve_model
from autodeploy.ops.batch_inputs import lookup
from autodeploy.ops.op import find_op
from autodeploy.transforms.lower.select_kernels import SelectKernels
from autodeploy.transforms.pipeline import configure, default_pipeline, kernel_choice

SYMBOL = re.compile(r"\bs\d+\b")


def graph_text(model: str | nn.Module, level: str, options: Options | None = None) -> str:
    """One line per node of the model's graph at a level (`captured`, `canonical`, `cached`, `lowered`).

    Raises:
        ConfigError: no such level. UnsupportedModelError: the level cannot be reached.
    """
    options = options or Options()
    names = [step.name.lower() for step in Level]
    if level.lower() not in names:
        raise ConfigError(f"level must be one of {', '.join(names)}; got {level!r}")
    wanted = Level[level.upper()]
    _, graph = _captured(model, options)
    for stage in _pipeline(options).stages:
        if stage.ensures is None or stage.ensures <= wanted:
            list(stage.run(graph, strict=options.compile.strict))
    return text_of(graph)


@dataclass(frozen=True)
class Change:
    """What one step did to the graph.

    Attributes:
        stage: its stage; `capture` for the first.
        name: the transform.
        report: what the transform said; None for the capture.
        nodes: nodes of the whole graph after it.
        diff: lines of the example layers and of what belongs to no layer, each after `+`, `-`, ` ` or `@` (a gap).
    """

    stage: str
    name: str
    report: TransformReport | None
    nodes: int
    diff: list[tuple[str, str]]


@dataclass(frozen=True)
class Call:
    """A node of the lowered graph that costs something."""

    layer: str | None
    module: str
    name: str
    op: str
    provider: str
    result: str
    source: str
    reads: tuple[str, ...]
    """names of the weights it reads"""
    cost: Cost


@dataclass
class Inspection:
    """Everything that can be told of a build without weights."""

    report: BuildReport
    kinds: list[LayerKind]
    changes: list[Change]
    calls: list[Call]
    levels: dict[str, list[str]]
    """level -> listing of the example layers and of what belongs to no layer"""
    graph: ModelGraph
    parameters: dict[str, tuple[int, int]] = field(default_factory=dict)
    """source tensor -> elements and bytes, each once"""


def inspect_model(
    model: str | nn.Module, options: Options | None = None, *, progress: Progress | None = None
) -> Inspection:
    """Capture and transform a model as a build does, and keep what each step did.

    Raises:
        AutoDeployError: as `build`.
    """
    options = options or Options()
    progress = progress or (lambda _: None)
    progress("capturing the graph")
    facts, graph = _captured(model, options)
    pipeline = _pipeline(options)
    listings: list[tuple[str, str, TransformReport | None, list[_Line]]] = [("capture", "capture", None, _list(graph))]
    level_of = {Level.CAPTURED: listings[0][3]}
    report = BuildReport(facts=facts)
    kinds: list[LayerKind] = []
    for stage in pipeline.stages:
        progress(f"transforming the graph: {stage.name}")
        for entry in stage.run(graph, strict=options.compile.strict):
            report.transforms.append(entry)
            listings.append((stage.name, entry.name, entry, _list(graph)))
        if stage.ensures is not None:
            level_of[stage.ensures] = listings[-1][3]
        if graph.level >= Level.CANONICAL and not kinds:
            kinds = layer_kinds(graph)
    report.kernels = graph.providers()
    selection = pipeline.transforms()[SelectKernels.name()]
    if isinstance(selection, SelectKernels):
        report.kernel_reasons = {op: sorted(why) for op, why in selection.reasons.items()}
    shown = {kind.example for kind in kinds}
    return Inspection(
        report=report,
        kinds=kinds,
        changes=_changes(listings, shown),
        calls=_calls(graph),
        levels={level.name: [line.text for line in lines if line.is_shown(shown)] for level, lines in level_of.items()},
        graph=graph,
        parameters=_parameters(graph),
    )


@dataclass(frozen=True)
class _Line:
    """A node as text, with the layer it belongs to."""

    layer: str | None
    text: str

    def is_shown(self, layers: set[str]) -> bool:
        return self.layer is None or self.layer in layers


def _captured(model: str | nn.Module, options: Options) -> tuple[dict[str, Any], ModelGraph]:
    """Facts for the report, and the model's graph at level CAPTURED."""
    name = type(model).__name__
    if isinstance(model, str):
        # Nothing is read but the config, so a folder without weights will do.
        resolved = resolve_model(model, dataclasses.replace(options.model, load_format="dummy"))
        name, remote = resolved.located.name, options.model.trust_remote_code
        model = instantiate(resolved.config, dtype=resolved.dtype, trust_remote_code=remote)
    graph = capture(model)
    verify(graph, Level.CAPTURED)
    dtype = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    device = resolve_device(options.compile.device)
    facts = {
        "model": name,
        "architecture": type(model).__name__,
        "dtype": str(dtype).removeprefix("torch."),
        "device": str(device),
        "compile_backend": resolve_backend(options.compile.compile_backend, device),
    }
    return facts, graph


def _pipeline(options: Options) -> Pipeline:
    device = resolve_device(options.compile.device)
    return configure(default_pipeline(device, kernel_choice(device, options.compile)), options.compile)


def _list(graph: ModelGraph) -> list[_Line]:
    """The graph as lines, with the sizes of inputs by their letters instead of the tracer's symbols."""
    letters = _letters(graph)
    return [
        _Line(place(node)[0], SYMBOL.sub(lambda match: letters.get(match[0], match[0]), node_text(graph, node)))
        for node in graph.graph.nodes
    ]


def _letters(graph: ModelGraph) -> dict[str, str]:
    letters: dict[str, str] = {}
    for node in graph.inputs():
        declared = lookup(str(node.target))
        for size, dim in zip(node.meta["val"].shape, declared.dims if declared else (), strict=False):
            letters.setdefault(str(size), str(dim).replace("S+1", "B"))
    return letters


def _changes(listings: list[tuple[str, str, TransformReport | None, list[_Line]]], shown: set[str]) -> list[Change]:
    changes = []
    before: list[str] = []
    for stage, name, report, lines in listings:
        after = [line.text for line in lines if line.is_shown(shown)]
        diff = [] if report is None else _diff(before, after)
        changes.append(Change(stage, name, report, len(lines), diff))
        before = after
    return changes


def _diff(before: list[str], after: list[str]) -> list[tuple[str, str]]:
    """Changed lines with two around them."""
    lines = list(difflib.unified_diff(before, after, lineterm="", n=2))[2:]
    return [("@", "") if line.startswith("@@") else (line[0], line[1:]) for line in lines]


def _calls(graph: ModelGraph) -> list[Call]:
    letters = _letters(graph)
    calls = []
    for node in graph.graph.nodes:
        cost = node_cost(graph, node)
        if cost == Cost():
            continue
        op, (layer, module) = find_op(node.target), place(node)
        text = SYMBOL.sub(lambda match: letters.get(match[0], match[0]), node_text(graph, node))
        calls.append(
            Call(
                layer=layer,
                module=module,
                name=node.name,
                op=op.name if op is not None else str(node.target).removesuffix(".default"),
                provider=node.meta.get("provider", ""),
                result=text.split(" = ")[0].partition(": ")[2],
                source=source_line(node),
                reads=tuple(str(source.target) for source in node.all_input_nodes if source.op == "get_attr"),
                cost=cost,
            )
        )
    return calls


def _parameters(graph: ModelGraph) -> dict[str, tuple[int, int]]:
    """Every tensor of the checkpoint that the graph reads."""
    sizes: dict[str, tuple[int, int]] = {}
    pending = list(graph.weights.values())
    while pending:
        recipe = pending.pop()
        if isinstance(recipe, Source):
            sizes[recipe.name] = (math.prod(recipe.shape), weight_bytes(recipe))
        else:
            pending += recipe.parts if isinstance(recipe, Concat) else [recipe.of]
    return sizes
