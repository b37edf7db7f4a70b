"""torch-compile: the transformed graph goes through Inductor once, with symbolic sizes, before the first request.

Compilation takes the fake inputs that the graph has carried since capture, so that one artefact serves every number of
tokens, sequences and pages, and nothing recompiles while serving. Ops that look at tensor values stay opaque calls.
"""

import copy
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.utils import counters
from torch._guards import TracingContext, tracing
from torch._inductor.compile_fx import compile_fx

from autodeploy.compile.bind import bind_kernels
from autodeploy.compile.program import GraphFunction
from autodeploy.compile.segments import CompileRegion, SegmentFunction
from autodeploy.graph.model_graph import ModelGraph
from autodeploy.graph.report import BuildReport


def region_compiler(graph: ModelGraph) -> CompileRegion:
    """What compiles the regions of a graph, each for every number of tokens."""

    def compile_region(module: fx.GraphModule) -> SegmentFunction:
        inputs = [node.meta["val"] for node in module.graph.find_nodes(op="placeholder")]
        with torch.no_grad(), tracing(TracingContext(graph.fake_mode)):
            compiled: Any = compile_fx(module, inputs)
        function: SegmentFunction = compiled
        return function

    return compile_region


def num_compilations() -> int:
    """How many graphs Inductor has compiled in this process, or found in its cache, by its own count."""
    outcomes = ("fxgraph_cache_hit", "fxgraph_cache_miss", "fxgraph_cache_bypass")
    return sum(counters["inductor"][outcome] for outcome in outcomes)


def compile_inductor(graph: ModelGraph, report: BuildReport) -> GraphFunction:
    """A compiled function of the graph's inputs in order; the fact `compilations` says how many that took."""
    bind_kernels(graph, keep_opaque=True, keep_kernels=True)
    inputs = [node.meta["val"] for node in graph.inputs()]
    before = num_compilations()
    with torch.no_grad(), tracing(TracingContext(graph.fake_mode)):
        compiled: Any = compile_fx(copy.copy(graph.module), inputs)
    report.facts["compilations"] = num_compilations() - before

    def run(*arguments: Tensor) -> Tensor:
        output = compiled(*arguments)
        result: Tensor = output[0] if isinstance(output, tuple | list) else output
        return result

    return run
