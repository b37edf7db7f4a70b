"""Binding: op nodes of a lowered graph go in, direct calls of the chosen providers' functions come out."""

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from autodeploy.graph.model_graph import ModelGraph
from autodeploy.ops.op import NAMESPACE, REFERENCE, Op, PlanFacts, StepPlan, find_op

PLAN = "plan"
"""Where a node keeps the plan of its kernel."""

_libraries: dict[str, torch.library.Library] = {}


def bind_kernels(graph: ModelGraph, *, keep_opaque: bool = False, keep_kernels: bool = False) -> None:
    """Replace each op node's target by its provider's function, so that a step calls kernels without a dispatcher.

    Args:
        keep_opaque: leave ops that look at tensor values as registered operators, for whoever watches what is called
            inside.
        keep_kernels: leave kernels so too.
    """
    for node, op in list(graph.op_nodes()):
        provider = node.meta["provider"]
        if provider == REFERENCE:
            if not (op.opaque and keep_opaque):
                node.target = op.reference
        elif PLAN in node.meta:
            node.target = node.meta[PLAN].run
        else:
            node.target = kernel_operator(op, provider) if keep_kernels else op.kernels[provider].function
    graph.module.recompile()


def bind_plans(graph: ModelGraph, device: torch.device) -> tuple[StepPlan, ...]:
    """The plans to prepare before each step, for the calls of kernels that plan on the host; to be done first."""
    plans: dict[PlanFacts, StepPlan] = {}
    for node, op in graph.op_nodes():
        kernel = op.kernels.get(node.meta["provider"])
        if kernel is None or kernel.plan_facts is None:
            continue
        nodes = op.arguments(node.args, node.kwargs)
        inputs = {
            name: str(value.target)
            for name, value in nodes.items()
            if isinstance(value, fx.Node) and value.op == "placeholder"
        }
        facts = kernel.plan_facts(inputs, **fx.map_arg(nodes, lambda argument: argument.meta["val"]))
        if facts not in plans:
            plans[facts] = facts.start(device)
        node.meta[PLAN] = plans[facts]
    return tuple(plans.values())


def kernel_function(node: fx.Node) -> Callable[..., Any]:
    """What a call of a lowered graph runs: its provider's function, or the target itself where it is no op of ours."""
    op = find_op(node.target)
    if op is None:
        assert callable(node.target)
        return node.target
    provider = node.meta["provider"]
    return op.reference if provider == REFERENCE else op.kernels[provider].function


def kernel_operator(op: Op, provider: str) -> OpOverload:
    """The registered operator `autodeploy_<provider>::<op>` for a provider's kernel, with the op's schema and fake."""
    namespace = f"{NAMESPACE}_{provider}"
    if namespace not in _libraries:
        _libraries[namespace] = torch.library.Library(namespace, "FRAGMENT")
    operators, library = getattr(torch.ops, namespace), _libraries[namespace]
    if not hasattr(operators, op.name):
        library.define(op.name + torch.library.infer_schema(op.reference, mutates_args=op.mutates))
        library.impl(op.name, op.kernels[provider].function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{namespace}::{op.name}", op.overload, lib=library)
    operator: OpOverload = getattr(operators, op.name).default
    return operator
