"""PlaceOnDevice: devices baked in while tracing become the device that the program runs on."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from autodeploy.graph.model_graph import ModelGraph
from autodeploy.graph.transform import Transform, TransformResult


@dataclass(frozen=True, kw_only=True)
class PlaceOnDevice(Transform):
    """`arange(4, device=cpu)`  becomes  `arange(4, device=cuda:0)`; constants move along.

    Tracing always runs on (fake) CPU tensors, so that a graph is the same on every machine.
    """

    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def apply(self, graph: ModelGraph) -> TransformResult:
        if self.device.type == "cpu":
            return TransformResult()
        found = 0
        for node in graph.graph.nodes:
            args, kwargs = (fx.node.map_aggregate(part, self._place) for part in (node.args, node.kwargs))
            if args != node.args or kwargs != node.kwargs:
                node.args, node.kwargs = args, kwargs
                found += 1
        for name, buffer in list(graph.module.named_buffers()):
            graph.module.register_buffer(name, buffer.to(self.device), persistent=False)
        self._move_values(graph)
        return TransformResult(found=found, rewritten=found)

    def _move_values(self, graph: ModelGraph) -> None:
        """Recompute every fake value on the device, for kernels to be chosen and compiled by."""
        with graph.fake_mode:
            for node in graph.graph.nodes:
                value = node.meta.get("val")
                if node.op in ("placeholder", "get_attr") and isinstance(value, torch.Tensor):
                    node.meta["val"] = torch.empty_strided(
                        value.shape, value.stride(), dtype=value.dtype, device=self.device
                    )
                elif node.op == "call_function":
                    args, kwargs = fx.map_arg((node.args, node.kwargs), lambda argument: argument.meta["val"])
                    node.meta["val"] = node.target(*args, **kwargs)

    def _place(self, value: Any) -> Any:
        return self.device if isinstance(value, torch.device) else value
