"""torch-compile: the transformed graph goes through Inductor once, with symbolic sizes, before the first request.

Compilation takes the fake inputs that the graph has carried since capture, so that one artefact serves every number of
tokens, sequences and pages, and nothing recompiles while serving. Ops that look at tensor values stay opaque calls.
"""

import copy
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch._inductor.compile_fx import compile_fx

from autodeploy.compile.bind import bind_kernels
from autodeploy.compile.program import GraphFunction
from autodeploy.graph.model_graph import ModelGraph


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
