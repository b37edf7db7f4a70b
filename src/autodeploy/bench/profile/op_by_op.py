"""OpByOp: a lowered graph goes in; a step's calls are run one by one, each timed and named in the trace.

Each call runs the function that its provider has for it, as `torch-simple` does, whatever backend serves: what is
repeated as one call, launched as one graph or fused shows no op by itself.
"""

import copy
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.profiler import record_function

from autodeploy.compile.bind import kernel_function
from autodeploy.debug.costs import Cost, node_cost
from autodeploy.graph.model_graph import ModelGraph
from autodeploy.ops.op import REFERENCE, find_op


@dataclass(frozen=True)
class Call:
    """A call of the graph.

    Attributes:
        name: the node's.
        op: what it computes: an op's name, or torch's own operator.
        provider: whose kernel it is.
        weights: shapes of the matrices it reads, e.g. `4096x14336`.
        cost: what it has to do and to move.
    """

    name: str
    op: str
    provider: str
    weights: str
    cost: Cost

    @property
    def label(self) -> str:
        """Its name in the trace."""
        return f"{self.op} ({self.provider}) {self.name}"


class OpByOp:
    """The calls of a graph, before a backend changes it; weights are the graph's own.

    Args:
        graph: lowered, with its weights loaded.
    """

    def __init__(self, graph: ModelGraph) -> None:
        nodes = [node for node in graph.graph.nodes if node.op == "call_function"]
        self.calls = [_call(graph, node) for node in nodes]
        self._functions = {node.name: kernel_function(node) for node in nodes}
        self._inputs = [str(node.target) for node in graph.inputs()]
        self._module, self._graph = graph.module, copy.deepcopy(graph.graph)

    @torch.inference_mode()
    def run(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, float]]:
        """Run a step; its logits, and seconds that each call kept this thread busy, by its name.

        Args:
            inputs: batch inputs and states by name; states are updated in place.
        """
        run = _Run(self._module, self._graph, self._functions, {call.name: call.label for call in self.calls})
        logits: Tensor = run.run(*[inputs[name] for name in self._inputs])
        return logits, run.seconds

    def medians(self, inputs: Mapping[str, Tensor], repeats: int) -> dict[str, float]:
        """The seconds of `run`, the median of several, after one that is not counted."""
        samples: dict[str, list[float]] = defaultdict(list)
        for repeat in range(repeats + 1):
            _, seconds = self.run(inputs)
            for name in seconds if repeat else ():
                samples[name].append(seconds[name])
        return {name: statistics.median(values) for name, values in samples.items()}


class _Run(fx.Interpreter):
    def __init__(
        self, module: fx.GraphModule, graph: fx.Graph, functions: dict[str, Callable[..., Any]], labels: dict[str, str]
    ) -> None:
        super().__init__(module, graph=graph)
        self._functions, self._labels = functions, labels
        self.seconds: dict[str, float] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_function":
            return super().run_node(n)
        function, (args, kwargs) = self._functions[n.name], self.fetch_args_kwargs_from_env(n)
        with record_function(self._labels[n.name]):
            begin = time.perf_counter()
            result = function(*args, **kwargs)
            self.seconds[n.name] = time.perf_counter() - begin
        return result


def _call(graph: ModelGraph, node: fx.Node) -> Call:
    op = find_op(node.target)
    recipes = [graph.recipe(source) for source in node.all_input_nodes]
    shapes = ["x".join(map(str, recipe.shape)) for recipe in recipes if recipe is not None and len(recipe.shape) > 1]
    return Call(
        name=node.name,
        op=getattr(node.target, "__name__", str(node.target)) if op is None else op.name,
        provider=REFERENCE if op is None else node.meta["provider"],
        weights=", ".join(shapes),
        cost=node_cost(graph, node),
    )
