"""build(model, options) -> Program: the compiler half, step by step.

resolve    a name, file or module      -> config, files, dtype
capture    nn.Module                   -> graph at level CAPTURED, no weight read
transform  the pipeline's stages       -> LOWERED, weight recipes rewritten along; kept for the next start
load       recipes                     -> final weights, streamed once
compile    graph and weights           -> a function of one step
check      two packed sequences        -> each as if it were alone
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn

from autodeploy.checkpoint.kept import KeptWeights
from autodeploy.checkpoint.load import load_weights, weight_bytes
from autodeploy.checkpoint.recipe import ReadTensor, renamed
from autodeploy.compile.backends import compile_graph, require_backend, resolve_backend
from autodeploy.compile.bind import bind_plans
from autodeploy.compile.cuda_graph import GraphedFunction
from autodeploy.compile.program import DraftHead, NamedGraph, Program, Progress
from autodeploy.config import CompileOptions, Options, SpeculativeOptions
from autodeploy.debug.isolation import check_isolation
from autodeploy.errors import ConfigError
from autodeploy.graph.levels import Level
from autodeploy.graph.model_graph import ModelGraph
from autodeploy.graph.report import BuildReport
from autodeploy.graph.verify import verify
from autodeploy.graph_cache import GraphCache
from autodeploy.kernels.beside import kernels_beside, why_not_taken
from autodeploy.kernels.provider import mixer_priority, prepare
from autodeploy.models.limits import longest_context
from autodeploy.models.locate import LocatedModel, locate_model
from autodeploy.ops.fp8_linear import fp8_linear
from autodeploy.ops.fp8_moe import fp8_moe
from autodeploy.ops.linear import linear
from autodeploy.ops.moe import expert_linear, moe
from autodeploy.ops.nvfp4_linear import nvfp4_linear
from autodeploy.ops.nvfp4_moe import nvfp4_moe
from autodeploy.ops.op import Kernel
from autodeploy.ops.quantized_linear import quantized_linear
from autodeploy.ops.quantized_moe import quantized_moe
from autodeploy.ops.sampling import choose_tokens
from autodeploy.transforms.cache.keep_hidden_states import KeepHiddenStates, kept_state

# Importing transformers, and torch.export, takes longer than the whole start of a model whose graph was kept. So the
# steps that need them import them.

Observer = Callable[[ModelGraph], None]


def build(
    model: str | LocatedModel | nn.Module,
    options: Options | None = None,
    *,
    progress: Progress | None = None,
    lowered: Observer | None = None,
) -> Program:
    """Turn a model into a program.

    Args:
        model: a checkpoint folder, GGUF file or hub id (or where `locate_model` found it), or a module that maps token
            ids `[1, T]` to logits `[1, T, V]`.
        options: default: all defaults.
        progress: called with one line when a stage begins.
        lowered: called with each lowered graph and its weights, before it is compiled.
    Raises:
        AutoDeployError: see `errors.py`; each kind says what was found, what was expected and what to do.
    """
    options = options or Options()
    clock = _Clock(BuildReport(), progress or (lambda _: None), lowered or (lambda _: None))
    device = resolve_device(options.compile.device)
    require_backend(options.compile.compile_backend, device)
    mixer_priority(device, options.compile.attn_backend)  # refuses, or loads, before anything is done
    speculation = SpeculativeOptions.of(options.engine.speculative_config)
    if speculation is not None and speculation.uses_head:
        return _build_with_head(model, options, speculation, device, clock)
    if isinstance(model, nn.Module):
        with clock.stage("resolve", "looking at the module"):
            subject = _subject_of_module(model, options)
        return _finish(_lower(subject, options.compile, device, clock), subject, options.compile, device, clock)
    with clock.stage("resolve", "finding the model"):
        located = locate_model(model, options.model) if isinstance(model, str) else model
        kept = GraphCache.kept(located, device, options)
    restored = kept.restore(clock.report) if kept is not None else None
    if restored is not None:
        graph, facts = restored
        subject = _kept_subject(facts, located, options)
        return _finish(graph, subject, options.compile, device, clock, weights=_kept_weights(kept, located, options))
    subject = subject_of_model(located, options)
    graph = _lower(subject, options.compile, device, clock)
    cache = GraphCache.of(located, device, options)
    if cache is not None:
        cache.describe(graph)
    weights = _kept_weights(cache, located, options)
    program = _finish(graph, subject, options.compile, device, clock, weights=weights)
    if cache is not None:
        cache.save(graph, clock.report, subject.to_keep(graph))
    return program


def _build_with_head(
    model: str | LocatedModel | nn.Module,
    options: Options,
    speculation: SpeculativeOptions,
    device: torch.device,
    clock: "_Clock",
) -> Program:
    """`build` of a model and the draft head that `speculation` names. Neither graph is kept for later starts."""
    from autodeploy.capture.export import capture
    from autodeploy.models.draft_head import HEAD_PREFIX, head_beside

    with clock.stage("resolve", "finding the model and its draft head"):
        if isinstance(model, nn.Module):
            located, subject = None, _subject_of_module(model, options)
        else:
            located = locate_model(model, options.model) if isinstance(model, str) else model
            subject = subject_of_model(located, options)
        assert subject.module is not None
        row, read = head_beside(subject.module, located, speculation, options.model, subject.dtype)
    keep = {KeepHiddenStates.name(): {"enabled": True}}
    compile_options = replace(options.compile, transforms={**options.compile.transforms, **keep})
    graph = _lower(subject, compile_options, device, clock)
    with clock.stage("head", "capturing the draft head"):
        traits = (row.hidden_size, subject.dtype)
        head = capture(row, name="head", repeat_layers=False, hidden_states=traits)
        name_of = row.renamed(subject.module)  # what it shares with the model has the model's recipes
        head.weights.update({name: renamed(recipe, name_of) for name, recipe in head.weights.items()})
        verify(head, Level.CAPTURED)
        transform(head, compile_options, device)

    def read_both(name: str) -> torch.Tensor:
        is_of_head = name.startswith(HEAD_PREFIX)
        return read(name.removeprefix(HEAD_PREFIX)) if is_of_head else subject.read(name)

    return _finish(graph, replace(subject, read=read_both), compile_options, device, clock, head)


def resolve_device(wanted: str) -> torch.device:
    """The device that `wanted` stands for; `auto` takes CUDA where there is one.

    Raises:
        ConfigError: an unknown device, or CUDA without one.
    """
    if wanted == "auto":
        return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(wanted)
    except RuntimeError as error:
        raise ConfigError(f"device must be auto, cpu, cuda or cuda:<n>; got {wanted!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise ConfigError(f"device must be auto, cpu, cuda or cuda:<n>; got {wanted!r}")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError("device is 'cuda', but this machine or this build of torch has none; use device='cpu'")
        return torch.device("cuda", device.index or 0)
    return device


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is to be built: the module to trace, where its weights come from, and what is known of it."""

    module: nn.Module | None
    """None where a kept graph makes it unnecessary"""
    read: ReadTensor
    dtype: torch.dtype
    made_for: int | None
    """longest context in tokens that its config names"""
    max_model_len: int | None
    eos_token_ids: tuple[int, ...] = ()
    facts: dict[str, Any]
    stored_names: Callable[[list[str]], dict[str, str] | None] = lambda _: None
    """module names -> stored names, where each is one stored tensor as it is"""

    def to_keep(self, graph: ModelGraph) -> dict[str, Any]:
        """What `_kept_subject` makes a subject of, as JSON values."""
        sources = sorted({name for recipe in graph.weights.values() for name in recipe.sources()})
        return {
            "dtype": str(self.dtype).removeprefix("torch."),
            "made_for": self.made_for,
            "eos_token_ids": list(self.eos_token_ids),
            "facts": self.facts,
            "stored_names": self.stored_names(sources),
        }


@dataclass(frozen=True)
class _Clock:
    """Times stages, tells the user about them, shows lowered graphs to who asked for them, and keeps the report."""

    report: BuildReport
    progress: Progress
    lowered: Observer = lambda _: None

    @contextlib.contextmanager
    def stage(self, name: str, says: str) -> Iterator[None]:
        self.progress(says)
        start = time.perf_counter()
        yield
        self.report.seconds[name] = time.perf_counter() - start


def subject_of_model(located: LocatedModel, options: Options) -> Subject:
    """The module of a located model, parameters on the meta device, and where its weights come from.

    Raises:
        AutoDeployError: a config, checkpoint or option that does not make a model.
    """
    from autodeploy.checkpoint.index import CheckpointIndex, DummyReader
    from autodeploy.models.instantiate import instantiate
    from autodeploy.models.resolve import resolve_model

    resolved = resolve_model(located, options.model)
    module = instantiate(resolved.config, dtype=resolved.dtype, trust_remote_code=options.model.trust_remote_code)
    facts = {"model": located.name, "architecture": type(module).__name__, "unexpected_tensors": list[str]()}
    known: dict[str, Any] = {
        "module": module,
        "dtype": resolved.dtype,
        "made_for": resolved.made_for,
        "max_model_len": resolved.max_model_len,
        "eos_token_ids": resolved.eos_token_ids,
        "facts": facts,
    }
    if options.model.load_format == "dummy":
        return Subject(read=DummyReader(module).read, **known)
    index = CheckpointIndex(located.stored, module)
    facts["unexpected_tensors"] = list(index.check())
    return Subject(read=index.read, stored_names=index.stored_names, **known)


def _kept_subject(kept: dict[str, Any], located: LocatedModel, options: Options) -> Subject:
    """The subject of a kept graph; its module is made anew only where weights are not read as they are stored."""
    names = kept["stored_names"]
    if names is None:
        return subject_of_model(located, options)
    return Subject(
        module=None,
        read=lambda name: located.stored.read(names[name]),
        dtype=getattr(torch, kept["dtype"]),
        made_for=kept["made_for"],
        max_model_len=longest_context(kept["made_for"], options.model.max_model_len),
        eos_token_ids=tuple(kept["eos_token_ids"]),
        facts=kept["facts"] | {"model": located.name},
    )


def _kept_weights(cache: GraphCache | None, located: LocatedModel, options: Options) -> KeptWeights | None:
    """Where the model's quantised weights are kept; None where graphs are not kept either."""
    if cache is None or not options.compile.weight_cache:
        return None
    compile_options = options.compile
    owner = {
        "folder": str(located.folder.resolve()),
        "device": compile_options.device,
        "quantization": [compile_options.quantization, compile_options.quantization_group_size],
    }
    return KeptWeights(cache.path.name, owner, located.weight_files)


def _subject_of_module(module: nn.Module, options: Options) -> Subject:
    floating = [p.dtype for p in module.parameters() if p.is_floating_point()]
    if not floating:
        raise ConfigError(f"{type(module).__name__} has no floating-point parameters; a language model has some")
    wanted = options.model.dtype
    if wanted != "auto" and getattr(torch, wanted) != floating[0]:
        raise ConfigError(
            f"dtype={wanted!r}, but the module's parameters are {floating[0]};"
            f" convert it first: module.to(torch.{wanted})"
        )
    from transformers import PreTrainedModel

    from autodeploy.checkpoint.index import ModuleReader
    from autodeploy.models.resolve import eos_token_ids, length_made_for

    module.eval()
    made_for: int | None = None
    ends: tuple[int, ...] = ()
    if isinstance(module, PreTrainedModel):
        generation = module.generation_config.to_dict() if module.generation_config is not None else {}
        made_for, ends = length_made_for(module.config), eos_token_ids(module.config, generation)
    return Subject(
        module=module,
        read=ModuleReader(module).read,
        dtype=floating[0],
        made_for=made_for,
        max_model_len=longest_context(made_for, options.model.max_model_len),
        eos_token_ids=ends,
        facts={"model": type(module).__name__, "architecture": type(module).__name__},
    )


def transform(
    graph: ModelGraph, options: CompileOptions, device: torch.device, clock: _Clock | None = None
) -> BuildReport:
    """Run the pipeline on a captured graph; what each transform did goes into the report.

    Raises:
        GraphLevelError: a stage did not reach its level. TransformError: a transform failed, or strict found leftovers.
    """
    from autodeploy.transforms.lower.select_kernels import SelectKernels
    from autodeploy.transforms.pipeline import configure, default_pipeline, kernel_choice

    clock = clock or _Clock(BuildReport(), lambda _: None)
    pipeline = configure(default_pipeline(device, kernel_choice(device, options)), options)
    for stage in pipeline.stages:
        with clock.stage(stage.name, f"transforming the graph: {stage.name}"):
            clock.report.transforms.extend(stage.run(graph, strict=options.strict))
    selection = pipeline.transforms()[SelectKernels.name()]
    assert isinstance(selection, SelectKernels)
    clock.report.kernels.update(graph.providers())
    clock.report.kernel_reasons.update({name: sorted(why) for name, why in selection.reasons.items()})
    return clock.report


def _lower(subject: Subject, options: CompileOptions, device: torch.device, clock: _Clock) -> ModelGraph:
    """The subject's module as a graph at level LOWERED."""
    assert subject.module is not None
    with ThreadPoolExecutor(1) as background:  # the compiler of kernels keeps another core busy
        compiling = background.submit(prepare, device, clock.progress)
        with clock.stage("capture", "capturing the graph"):
            from autodeploy.capture.export import capture

            graph = capture(subject.module)
            verify(graph, Level.CAPTURED)
            clock.report.facts.update(captured_nodes=len(graph.graph.nodes), layers=graph.repetition)
        compiling.result()
    transform(graph, options, device, clock)
    return graph


def _load(graphs: Sequence[ModelGraph], read: ReadTensor, device: torch.device, kept: KeptWeights | None) -> int:
    """Read the graphs' weights; equal recipes share one tensor. Returns the bytes of all."""
    recipes = {f"{graph.name}.{name}": recipe for graph in graphs for name, recipe in graph.weights.items()}
    tensors = load_weights(recipes, read, device=device, kept=kept)
    for graph in graphs:
        for name in graph.weights:
            setattr(graph.module, name, nn.Parameter(tensors[f"{graph.name}.{name}"], requires_grad=False))
    return sum(weight_bytes(recipe) for recipe in set(recipes.values()))


def _finish(
    graph: ModelGraph,
    subject: Subject,
    options: CompileOptions,
    device: torch.device,
    clock: _Clock,
    head: ModelGraph | None = None,
    weights: KeptWeights | None = None,
) -> Program:
    graphs = [graph] if head is None else [graph, head]
    with clock.stage("load", "reading weights"):
        total_bytes = _load(graphs, subject.read, device, weights)
    if weights is not None and weights.is_used:
        clock.report.facts["weights"] = "quantised by an earlier start"
    backend = "torch-simple" if options.batch_invariant else resolve_backend(options.compile_backend, device)
    (logits,) = graph.graph.output_node().args
    (flops, head_flops), unread_bytes = _count_flops(graph), _unread_bytes(graph)
    text_bytes = sum(weight_bytes(recipe) for recipe in graph.weights.values())
    clock.report.facts.update(
        subject.facts,
        dtype=str(subject.dtype).removeprefix("torch."),
        device=str(device),
        compile_backend=backend,
        lowered_nodes=len(graph.graph.nodes),
        weight_bytes=total_bytes,
        flops_per_token=flops,
        flops_per_logits_row=head_flops,
        states=len(graph.states),
    )
    draft_head = None if head is None else _draft_head(graph, head)
    for each in graphs:
        clock.lowered(each)
    vocab_size = int(logits.meta["val"].shape[-1])  # type: ignore[union-attr]
    beside = kernels_beside(vocab_size, subject.dtype, device)
    clock.report.kernels.update({name: {kernel.provider: 1} for name, kernel in beside.items()})
    clock.report.kernel_reasons.update(why_not_taken(options.attn_backend))
    with clock.stage("compile", f"compiling ({backend})"):
        named = {each.name: _compiled(each, backend, device, options, clock.report, beside) for each in graphs}
    program = Program(
        graphs=named,
        states=tuple(graph.states),
        vocab_size=vocab_size,
        max_model_len=min((n for n in (subject.max_model_len, graph.max_length) if n is not None), default=None),
        dtype=subject.dtype,
        device=device,
        weight_bytes=total_bytes,
        step_weight_bytes=text_bytes - unread_bytes,
        flops_per_token=flops,
        flops_per_logits_row=head_flops,
        eos_token_ids=subject.eos_token_ids,
        head=draft_head,
        **{name: kernel.function for name, kernel in beside.items()},
        report=clock.report,
    )
    if options.check_isolation and "isolation" not in clock.report.facts:
        with clock.stage("check", "checking that packed sequences stay apart"):
            clock.report.facts["isolation"] = check_isolation(program, graph)
    return program


def _draft_head(graph: ModelGraph, head: ModelGraph) -> DraftHead:
    return DraftHead(states=tuple(head.states), hidden_state=kept_state(graph), own_hidden_state=kept_state(head))


def _compiled(
    graph: ModelGraph,
    backend: str,
    device: torch.device,
    options: CompileOptions,
    report: BuildReport,
    beside: Mapping[str, Kernel],
) -> NamedGraph:
    plans = bind_plans(graph, device)
    chooser = beside.get(choose_tokens.name) if graph.name == "text" else None  # nobody draws what a head drafts
    choose = None if chooser is None else chooser.function
    function = compile_graph(graph, backend, device, report, options.cudagraph_capture_sizes, choose)
    graphed = function if isinstance(function, GraphedFunction) else None
    run_and_choose = graphed.run_and_choose if graphed is not None and graphed.chooses_tokens else None
    names = tuple(spec.name for spec in graph.states)
    return NamedGraph(graph.name, function, graph.batch_inputs(), names, graphed, plans, run_and_choose)


def _count_flops(graph: ModelGraph) -> tuple[int, int]:
    """Operations of all products: per token of the row, and per row of logits for those that run on picked rows."""
    input_ids = graph.input("input_ids")
    assert input_ids is not None
    num_tokens = str(input_ids.meta["val"].shape[1])
    flops = {True: 0, False: 0}
    for op in (linear, quantized_linear, fp8_linear, nvfp4_linear):
        assert op.work is not None
        for node in graph.nodes(op):
            arguments = fx.map_arg(op.arguments(node.args, node.kwargs), lambda argument: argument.meta["val"])
            is_per_token = any(num_tokens == str(size) for size in arguments["x"].shape[:-1])
            flops[is_per_token] += op.work(**arguments).flops_per_token
    return flops[True] + sum(2 * count * each for _, count, each in _chosen_weights(graph)), flops[False]


_EXPERTS = (
    (moe, ("gate_up", "down"), ()),
    (expert_linear, ("weight",), ()),
    (quantized_moe, ("gate_up", "down"), ("gate_up_scales", "gate_up_offsets", "down_scales", "down_offsets")),
    (fp8_moe, ("gate_up", "down"), ("gate_up_scales", "down_scales")),
    (nvfp4_moe, ("gate_up", "down"), ("gate_up_scales", "down_scales")),
)
"""Ops that read experts' weights, the parameters that are weights, and those that belong to them."""


def _chosen_weights(graph: ModelGraph) -> Iterator[tuple[fx.Node, int, int]]:
    """Each node that reads experts' weights, how many of its elements one token's experts have, and weights in each."""
    input_ids = graph.input("input_ids")
    assert input_ids is not None
    for op, names, belonging in _EXPERTS:
        for node in graph.nodes(op):
            arguments = op.arguments(node.args, node.kwargs)
            indices = arguments["indices"].meta["val"]
            choices = _hint(indices.shape[0]) * _hint(indices.shape[1]) // _hint(input_ids.meta["val"].shape[1])
            for name in (*names, *belonging):
                weight: fx.Node | None = arguments[name]
                if weight is None:
                    continue
                value = weight.meta["val"]
                num_experts = arguments.get("num_experts", value.shape[0])
                packed = 8 // value.shape[2] if op is quantized_moe else 2 if op is nvfp4_moe else 1
                weights_each = 0 if name in belonging else packed
                yield weight, value.numel() // num_experts * min(choices, num_experts), weights_each


def _hint(size: int | torch.SymInt) -> int:
    return int(size.node.hint) if isinstance(size, torch.SymInt) else size


def _unread_bytes(graph: ModelGraph) -> int:
    """Bytes of weights that a step of one token leaves unread: tables it looks up, experts it does not choose."""
    lookups = (torch.ops.aten.embedding.default, torch.ops.aten.index_select.default)
    tables = [
        str(node.target)
        for node in graph.graph.find_nodes(op="get_attr")
        if all(user.target in lookups for user in node.users)
    ]
    unread = sum(weight_bytes(graph.weights[name]) for name in tables if name in graph.weights)
    experts = [(node.meta["val"], count) for node, count, _ in _chosen_weights(graph)]
    return unread + sum(int(value.numel() - count) * int(value.element_size()) for value, count in experts)
