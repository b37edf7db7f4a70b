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
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from autodeploy.checkpoint.index import CheckpointIndex, DummyReader, ModuleReader
from autodeploy.checkpoint.load import load_weights, weight_bytes
from autodeploy.checkpoint.recipe import ReadTensor
from autodeploy.compile.eager import compile_eager
from autodeploy.compile.program import GraphFunction, NamedGraph, Program
from autodeploy.config import CompileOptions, Options
from autodeploy.debug.isolation import check_isolation
from autodeploy.errors import ConfigError
from autodeploy.graph.levels import Level
from autodeploy.graph.model_graph import ModelGraph
from autodeploy.graph.report import BuildReport
from autodeploy.graph.verify import verify
from autodeploy.graph_cache import GraphCache
from autodeploy.kernels.provider import is_prepared, mixer_priority, prepare, priority
from autodeploy.models.instantiate import instantiate
from autodeploy.models.resolve import ResolvedModel, eos_token_ids, max_model_len, resolve_model
from autodeploy.ops.linear import linear
from autodeploy.transforms.lower.select_kernels import SelectKernels
from autodeploy.transforms.pipeline import configure, default_pipeline

Progress = Callable[[str], None]


def build(model: str | nn.Module, options: Options | None = None, *, progress: Progress | None = None) -> Program:
    """Turn a model into a program.

    Args:
        model: a checkpoint folder, GGUF file or hub id, or a module that maps token ids `[1, T]` to logits `[1, T, V]`.
        options: default: all defaults.
        progress: called with one line when a stage begins.
    Raises:
        AutoDeployError: see `errors.py`; each kind says what was found, what was expected and what to do.
    """
    options = options or Options()
    clock = _Clock(BuildReport(), progress or (lambda _: None))
    device = resolve_device(options.compile.device)
    with clock.stage("resolve", "finding the model"):
        subject = _resolve(model, options)
    captured = None
    if not is_prepared(device):  # the compiler of kernels and the capture of the graph keep a core each busy
        with ThreadPoolExecutor(1) as background:
            background.submit(prepare, device, clock.progress)
            captured = _capture(subject.module, clock)
    cache = GraphCache.of(subject.config, subject.dtype, device, options.compile)
    graph = cache.restore(clock.report) if cache is not None and captured is None else None
    if graph is None:
        graph = captured or _capture(subject.module, clock)
        transform(graph, options.compile, device, clock)
        if cache is not None:
            cache.describe(graph)
    with clock.stage("load", "reading weights"):
        _load(graph, subject.read, device)
    program = _finish(graph, subject, options.compile, device, clock)
    if cache is not None:
        cache.save(graph, clock.report)
    return program


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
class _Subject:
    """What is to be built: the module to trace, where its weights come from, and what is known of it."""

    module: nn.Module
    config: PreTrainedConfig | None = None
    """what the module was made from; None for a user's own module and for remote code, whose code no config tells"""
    read: ReadTensor
    dtype: torch.dtype
    max_model_len: int | None
    eos_token_ids: tuple[int, ...] = ()
    facts: dict[str, Any]


@dataclass(frozen=True)
class _Clock:
    """Times stages, tells the user about them, and keeps the report."""

    report: BuildReport
    progress: Progress

    @contextlib.contextmanager
    def stage(self, name: str, says: str) -> Iterator[None]:
        self.progress(says)
        start = time.perf_counter()
        yield
        self.report.seconds[name] = time.perf_counter() - start


def _resolve(model: str | nn.Module, options: Options) -> _Subject:
    if isinstance(model, nn.Module):
        return _subject_of_module(model, options)
    resolved: ResolvedModel = resolve_model(model, options.model)
    module = instantiate(resolved.config, dtype=resolved.dtype, trust_remote_code=options.model.trust_remote_code)
    if options.model.load_format == "dummy":
        read: ReadTensor = DummyReader(module).read
        unexpected: tuple[str, ...] = ()
    else:
        index = CheckpointIndex(resolved.weight_files, module)
        unexpected, read = index.check(), index.read
    return _Subject(
        module=module,
        config=None if options.model.trust_remote_code else resolved.config,
        read=read,
        dtype=resolved.dtype,
        max_model_len=resolved.max_model_len,
        eos_token_ids=resolved.eos_token_ids,
        facts={"model": resolved.name, "architecture": type(module).__name__, "unexpected_tensors": list(unexpected)},
    )


def _subject_of_module(module: nn.Module, options: Options) -> _Subject:
    floating = [p.dtype for p in module.parameters() if p.is_floating_point()]
    if not floating:
        raise ConfigError(f"{type(module).__name__} has no floating-point parameters; a language model has some")
    wanted = options.model.dtype
    if wanted != "auto" and getattr(torch, wanted) != floating[0]:
        raise ConfigError(
            f"dtype={wanted!r}, but the module's parameters are {floating[0]};"
            f" convert it first: module.to(torch.{wanted})"
        )
    module.eval()
    longest = options.model.max_model_len
    ends: tuple[int, ...] = ()
    if isinstance(module, PreTrainedModel):
        generation = module.generation_config.to_dict() if module.generation_config is not None else {}
        longest, ends = max_model_len(module.config, longest), eos_token_ids(module.config, generation)
    return _Subject(
        module=module,
        read=ModuleReader(module).read,
        dtype=floating[0],
        max_model_len=longest,
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
    clock = clock or _Clock(BuildReport(), lambda _: None)
    pipeline = configure(default_pipeline(device, kernel_choice(device, options)), options)
    for stage in pipeline.stages:
        with clock.stage(stage.name, f"transforming the graph: {stage.name}"):
            clock.report.transforms.extend(stage.run(graph, strict=options.strict))
    selection = pipeline.transforms()[SelectKernels.name()]
    assert isinstance(selection, SelectKernels)
    clock.report.kernels.update({name: dict(counts) for name, counts in selection.chosen.items()})
    clock.report.kernel_reasons.update({name: sorted(why) for name, why in selection.reasons.items()})
    return clock.report


def kernel_choice(device: torch.device, options: CompileOptions) -> SelectKernels:
    """How kernels are chosen for a device under these options.

    Raises:
        ConfigError: an attention backend that there is not.
    """
    return SelectKernels(
        priority=priority(device),
        mixer_priority=mixer_priority(device, options.attn_backend),
        compiled=options.compile_backend == "torch-compile",
    )


def _capture(module: nn.Module, clock: _Clock) -> ModelGraph:
    with clock.stage("capture", "capturing the graph"):
        # torch.export takes seconds to import, and a graph that is restored does without.
        from autodeploy.capture.export import capture

        graph = capture(module)
        verify(graph, Level.CAPTURED)
        clock.report.facts.update(captured_nodes=len(graph.graph.nodes), layers=graph.repetition)
    return graph


def _load(graph: ModelGraph, read: ReadTensor, device: torch.device) -> None:
    tensors = load_weights(graph.weights, read, device=device)
    for name, tensor in tensors.items():
        setattr(graph.module, name, nn.Parameter(tensor, requires_grad=False))


def _finish(
    graph: ModelGraph, subject: _Subject, options: CompileOptions, device: torch.device, clock: _Clock
) -> Program:
    backend = "torch-simple" if options.compile_backend == "auto" else options.compile_backend
    (logits,) = graph.graph.output_node().args
    flops, head_flops = _count_flops(graph)
    total_bytes = sum(weight_bytes(recipe) for recipe in graph.weights.values())
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
    with clock.stage("compile", f"compiling ({backend})"):
        function = compile_graph(graph, backend)
    state_names = tuple(spec.name for spec in graph.states)
    batch_inputs = tuple(str(node.target) for node in graph.inputs() if str(node.target) not in state_names)
    program = Program(
        graphs={graph.name: NamedGraph(graph.name, function, batch_inputs, state_names)},
        states=tuple(graph.states),
        vocab_size=int(logits.meta["val"].shape[-1]),  # type: ignore[union-attr]
        max_model_len=min((n for n in (subject.max_model_len, graph.max_length) if n is not None), default=None),
        dtype=subject.dtype,
        device=device,
        weight_bytes=total_bytes,
        step_weight_bytes=total_bytes - _lookup_bytes(graph),
        flops_per_token=flops,
        flops_per_logits_row=head_flops,
        eos_token_ids=subject.eos_token_ids,
        report=clock.report,
    )
    if options.check_isolation and "isolation" not in clock.report.facts:
        with clock.stage("check", "checking that packed sequences stay apart"):
            clock.report.facts["isolation"] = check_isolation(program, graph)
    return program


def _count_flops(graph: ModelGraph) -> tuple[int, int]:
    """Operations of all linears: per token of the row, and per row of logits for those that run on picked rows."""
    input_ids = graph.input("input_ids")
    assert input_ids is not None
    num_tokens = str(input_ids.meta["val"].shape[1])
    flops = {True: 0, False: 0}
    for node in graph.nodes(linear):
        x, weight = (argument.meta["val"] for argument in node.args[:2])  # type: ignore[union-attr]
        flops[any(num_tokens == str(size) for size in x.shape[:-1])] += 2 * weight.numel()
    return flops[True], flops[False]


def _lookup_bytes(graph: ModelGraph) -> int:
    """Bytes of weights that are only looked up by token: a step reads a few of their rows."""
    lookups = (torch.ops.aten.embedding.default, torch.ops.aten.index_select.default)
    tables = [
        str(node.target)
        for node in graph.graph.find_nodes(op="get_attr")
        if all(user.target in lookups for user in node.users)
    ]
    return sum(weight_bytes(graph.weights[name]) for name in tables if name in graph.weights)


def compile_graph(graph: ModelGraph, backend: str) -> GraphFunction:
    """A function of a lowered graph's inputs in order, by a backend's name; the graph holds its weights."""
    if backend == "torch-simple":
        return compile_eager(graph)
    # Importing Inductor takes a second that others need not pay.
    from autodeploy.compile.inductor import compile_inductor

    return compile_inductor(graph)
