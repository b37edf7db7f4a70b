"""SelectKernels: choose a provider for every op, record each choice and why others were passed over."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import fx

from autodeploy.errors import ConfigError, UnsupportedModelError
from autodeploy.graph.model_graph import ModelGraph
from autodeploy.graph.transform import Transform, TransformResult
from autodeploy.ops.op import OPS, REFERENCE, Kernel, Op
from autodeploy.transforms.lower.invariant_operators import require_invariant_operators


@dataclass(frozen=True, kw_only=True)
class SelectKernels(Transform):
    """Give every op node a provider: the first in `priority` that supports it, the reference if none does.

    Attributes:
        priority: providers in order of preference.
        mixer_priority: the same for ops that mix tokens (attention); None means as for every op.
        without: names of ops that keep the reference, which shows what their kernels are worth.
        batch_invariant: only kernels that promise it, see `Kernel`, and of other operators only those that keep it.
        compiled: a compiler takes the graph afterwards, so ops that it fuses with their neighbours are left to it.
        reasons: filled with op name -> why a provider of that op was passed over.
    """

    # Kernels add up in an order of their own.
    tolerance: ClassVar[Mapping[torch.dtype, float]] = {**Transform.tolerance, torch.float32: 1e-4}

    priority: tuple[str, ...] = ()
    mixer_priority: tuple[str, ...] | None = None
    without: tuple[str, ...] = ()
    compiled: bool = False
    batch_invariant: bool = False
    reasons: dict[str, set[str]] = field(default_factory=dict, compare=False)

    def apply(self, graph: ModelGraph) -> TransformResult:
        if unknown := sorted(set(self.without) - OPS.keys()):
            raise ConfigError(
                f"select_kernels: no op is called {', '.join(unknown)}; there are {', '.join(sorted(OPS))}"
            )
        if self.batch_invariant:
            require_invariant_operators(graph)
        found = 0
        for node, op in graph.op_nodes():
            found += 1
            node.meta["provider"] = self._provider(node, op)
        return TransformResult(found=found, rewritten=found, expected=found)

    def _provider(self, node: fx.Node, op: Op) -> str:
        if op.name in self.without:
            self.reasons.setdefault(op.name, set()).add("left to the reference, as asked")
            return REFERENCE
        arguments = fx.map_arg(op.arguments(node.args, node.kwargs), lambda argument: argument.meta["val"])
        is_mixer = op.mixes_tokens and self.mixer_priority is not None
        for provider in (self.mixer_priority or ()) if is_mixer else self.priority:
            kernel = op.kernels.get(provider)
            if kernel is None or (self.batch_invariant and not kernel.batch_invariant):
                continue
            reason = self._why_left(kernel) or kernel.supports(**arguments)
            if reason is None:
                return provider
            self.reasons.setdefault(op.name, set()).add(f"{provider}: {reason}")
        if self.batch_invariant and not op.batch_invariant:
            why = "; ".join(sorted(self.reasons.get(op.name, {"there is none"})))
            raise UnsupportedModelError(
                f"batch_invariant: no kernel of {op.name} promises the same bits in every batch here ({why}); leave "
                "batch_invariant out for this model"
            )
        return REFERENCE

    def _why_left(self, kernel: Kernel) -> str | None:
        if self.compiled and kernel.fuses_with_neighbours:
            return "left to the compiler, which fuses it"
        if self.compiled and kernel.plan_facts is not None:
            return "it plans steps on the host, and compiled code has no place for that"
        return None
