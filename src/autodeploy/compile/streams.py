"""Streams: branches that were marked in a lowered graph go in, calls that run them on a second stream come out.

A branch is launched behind all that was launched before it, beside what follows, and waited for before its results are
read. What it reads is held until then: memory that is given back is used anew by the stream that it is of, which does
not wait. What it made is used anew on its own stream, which waits at the next branch.

Where streams are not in use, which is the default, branches run in their place.
"""

import contextlib
import functools
import operator
from collections.abc import Iterator
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor, fx

from autodeploy.compile.bind import kernel_function
from autodeploy.compile.segments import why_unsafe
from autodeploy.graph.model_graph import BRANCH, ModelGraph


class Streams(Protocol):
    """A stream beside the current one."""

    def beside(self) -> AbstractContextManager[object]:
        """What is launched inside runs on the second stream, behind what the current one has been given so far."""

    def join(self) -> None:
        """What the current stream is given from here on waits for what the second one has been given."""


class CudaStreams:
    """Streams of a CUDA device, for one thread; what they are given while a graph is captured is part of the graph."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    @functools.cached_property
    def _second(self) -> torch.cuda.Stream:
        return torch.cuda.Stream(self._device)

    def beside(self) -> AbstractContextManager[object]:
        self._second.wait_stream(torch.cuda.current_stream(self._device))
        return torch.cuda.stream(self._second)

    def join(self) -> None:
        torch.cuda.current_stream(self._device).wait_stream(self._second)


class Branches:
    """The marked branches of a graph, each made one call of it that runs on a second stream where those are in use.

    To be made before kernels are bound, and before the graph is cut.

    A branch that cannot be captured stays where it is.

    Attributes:
        count: how many there are.
    """

    def __init__(self, graph: ModelGraph, streams: Streams) -> None:
        self._streams, self._in_use = streams, False
        members: dict[int, list[fx.Node]] = {}
        for node in graph.graph.nodes:
            if BRANCH in node.meta:
                members.setdefault(node.meta[BRANCH], []).append(node)
        safe = [nodes for nodes in members.values() if not any(map(why_unsafe, nodes))]
        self.count = len(safe)
        for nodes in safe:
            self._put_aside(graph, nodes)

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """While this lasts, branches run on the second stream."""
        self._in_use = True
        try:
            yield
        finally:
            self._in_use = False

    def join(self, *_held: Tensor) -> None:
        """Wait for a branch. What it reads is given, so that nobody gives it back before."""
        if self._in_use:
            self._streams.join()

    def _put_aside(self, graph: ModelGraph, nodes: list[fx.Node]) -> None:
        """One call in the place of a branch, and one that waits for it before the first that reads its results."""
        own = set(nodes)
        reads = list(dict.fromkeys(o for n in nodes for o in n.all_input_nodes if o not in own and o.op != "get_attr"))
        results = [node for node in nodes if any(user not in own for user in node.users)]
        part = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {node: part.placeholder(node.name) for node in reads}
        for node in nodes:
            for weight in node.all_input_nodes:
                if weight.op == "get_attr" and weight not in copies:
                    copies[weight] = part.node_copy(weight)
            copies[node] = part.node_copy(node, lambda other: copies[other])
            copies[node].target = kernel_function(node)
        part.output(tuple(copies[node] for node in results))
        branch = _Branch(self, fx.GraphModule(graph.module, part))
        with graph.graph.inserting_after(nodes[-1]):
            call = graph.graph.call_function(branch.run, tuple(reads))
        call.meta["val"] = tuple(node.meta["val"] for node in results)
        taken = []
        with graph.graph.inserting_before(call.next):
            for index, node in enumerate(results):
                taken.append(graph.graph.call_function(operator.getitem, (call, index)))
                taken[-1].meta["val"] = node.meta["val"]
        for node, item in zip(results, taken, strict=True):
            node.replace_all_uses_with(item, delete_user_cb=lambda user: user not in own)
        first = min(user for item in taken for user in item.users)
        with graph.graph.inserting_before(first):
            graph.graph.call_function(self.join, tuple(reads)).meta["val"] = None
        for node in reversed(nodes):
            graph.graph.erase_node(node)

    def enter(self) -> AbstractContextManager[object]:
        """Where a branch runs now."""
        return self._streams.beside() if self._in_use else contextlib.nullcontext()


class _Branch:
    """Calls that were put aside."""

    def __init__(self, branches: Branches, module: fx.GraphModule) -> None:
        self._branches, self._module = branches, module

    def run(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        with self._branches.enter():
            results: tuple[Tensor, ...] = self._module(*inputs)
            return results
