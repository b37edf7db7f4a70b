"""torch-compile: the transformed graph goes through Inductor once, with symbolic sizes, before the first request.

Compilation takes the fake inputs that the graph has carried since capture, so that one artefact serves every number of
tokens, sequences and pages, and nothing recompiles while serving. Ops that look at tensor values stay opaque calls.
"""

import copy
from typing import Any

import torch
from torch import Tensor, fx
from torch._guards import TracingContext, tracing
from torch._inductor.compile_fx import compile_fx

from autodeploy.compile.bind import bind_kernels
from autodeploy.compile.program import GraphFunction
from autodeploy.compile.segments import CompileRegion, SegmentFunction
from autodeploy.graph.model_graph import ModelGraph


def region_compiler(graph: ModelGraph) -> CompileRegion:
    """What compiles the regions of a graph, each for every number of tokens."""

    def compile_region(module: fx.GraphModule) -> SegmentFunction:
        inputs = [node.meta["val"] for node in module.graph.find_nodes(op="placeholder")]
        with torch.no_grad(), tracing(TracingContext(graph.fake_mode)):
            compiled: Any = compile_fx(module, inputs)
        function: SegmentFunction = compiled
        return function

    return compile_region


def compile_inductor(graph: ModelGraph) -> GraphFunction:
    """A compiled function of the graph's inputs in order."""
    bind_kernels(graph, keep_opaque=True, keep_kernels=True)
    inputs = [node.meta["val"] for node in graph.inputs()]
    with torch.no_grad(), tracing(TracingContext(graph.fake_mode)):
        compiled: Any = compile_fx(copy.copy(graph.module), inputs)

    def run(*arguments: Tensor) -> Tensor:
        output = compiled(*arguments)
        result: Tensor = output[0] if isinstance(output, tuple | list) else output
        return result

    return run
