"""Op: one typed pure-torch function that is the meaning, the fake, the fallback and the test oracle of an operation.

`@op()` registers the function as `torch.ops.autodeploy.<name>`, so that it shows as one node in a captured graph.
Around it hang its cached twin (the same op over state, for token mixers) and its kernels (other implementations, by
provider). The op table `OPS` is the package's only process-global state: tests, docs and lowering enumerate it.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._ops import OpOverload

from autodeploy.ops.state import StateSpec

NAMESPACE = "autodeploy"
REFERENCE = "torch"
"""The provider that every op has: its own reference function."""

_library = torch.library.Library(NAMESPACE, "FRAGMENT")

StateFunction = Callable[..., dict[str, StateSpec]]
SampleFunction = Callable[[], list[dict[str, Any]]]
SupportFunction = Callable[..., str | None]
WorkFunction = Callable[..., "Work"]
FactsFunction = Callable[..., "PlanFacts"]


class StepPlan(ABC):
    """What a kernel works out on the host, once for a step and all calls that share the plan."""

    @abstractmethod
    def prepare(self, batch: Mapping[str, Tensor], states: Mapping[str, Tensor]) -> None:
        """Plan a step; holds until the next one is planned.

        Args:
            batch: the step's batch inputs by name, on the host where they are known there.
            states: the states by name.
        """

    @abstractmethod
    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The kernel in the step that was planned, with the op's parameters."""


class PlanFacts(Hashable, Protocol):
    """What calls that share a plan have in common: equal facts, one plan."""

    def start(self, device: torch.device) -> StepPlan:
        """A new plan on a device, for any number of steps one after the other."""
        ...


@dataclass(frozen=True, kw_only=True)
class Work:
    """The least work that a call of an op is, whoever does it; what it reads and writes can be seen from its arguments.

    Attributes:
        flops_per_token: operations for each token of the packed row (or row of logits), a multiply-add being two.
        flops_per_key: operations for each token and each earlier token that it sees, itself included.
        window: most tokens that a token sees, or None for all.
        share_of_weights: share of the weights that one token needs, where a router chooses.
    """

    flops_per_token: int = 0
    flops_per_key: int = 0
    window: int | None = None
    share_of_weights: float = 1.0


@dataclass(frozen=True)
class Kernel:
    """One provider's implementation of an op.

    Attributes:
        provider: who provides it, e.g. `triton`.
        function: same signature as the op.
        supports: given the op's arguments (fake tensors), a reason to refuse or None. Never reads batch sizes.
        fuses_with_neighbours: a compiler fuses the reference with what stands around it, which is worth more than this
            kernel, an opaque call to the compiler.
        batch_invariant: a token's result has the same bits whatever else the step computes, and however its sequence is
            cut into steps.
        capture_safe: a device can capture a call and repeat it on other values of the same shapes: it launches what
            follows from shapes, reads nothing back, and plans nothing on the host.
        plan_facts: of a kernel that plans steps on the host. Given the names of graph inputs that are arguments, by
            parameter, and the op's (fake) arguments. `function` makes a plan of its own for each call.
    """

    provider: str
    function: Callable[..., Any]
    supports: SupportFunction
    fuses_with_neighbours: bool = False
    batch_invariant: bool = False
    capture_safe: bool = True
    plan_facts: FactsFunction | None = None


@dataclass(eq=False)
class Op:
    """An operation and everything declared about it.

    Attributes:
        name: what it computes, in the field's words.
        reference: the pure-torch function.
        overload: the registered torch operator that stands for it in graphs.
        opaque: the reference looks at tensor values (sequence boundaries), so a compiler must not trace into it.
        mutates: names of the parameters updated in place.
        batch_invariant: of the reference, as for a kernel.
        rounds_activations: what goes into a product is rounded to few levels, so that sums that differ in their last
            bit may give results that differ by the step of one value.
        tolerance: absolute and relative tolerance of kernels against the reference, by dtype.
        cached: the twin over state, when the op mixes tokens.
        states: for a token mixer, `states(**arguments) -> {state parameter of the cached twin: spec}`.
        samples: argument dictionaries that every implementation is tested on.
        work: given the op's arguments (fake tensors), what a call costs; without it an estimate from their sizes.
        kernels: implementations by provider, in order of registration.
    """

    name: str
    reference: Callable[..., Any]
    overload: OpOverload
    opaque: bool = False
    mutates: tuple[str, ...] = ()
    batch_invariant: bool = False
    rounds_activations: bool = False
    tolerance: Mapping[torch.dtype, float] = field(default_factory=dict)
    cached: "Op | None" = None
    states: StateFunction | None = None
    samples: SampleFunction | None = None
    work: WorkFunction | None = None
    kernels: dict[str, Kernel] = field(default_factory=dict)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.overload(*args, **kwargs)

    def __hash__(self) -> int:
        return hash(self.name)

    @property
    def mixes_tokens(self) -> bool:
        """True when tokens influence each other, so that decoding needs state."""
        return self.states is not None or self.is_cached

    @property
    def is_cached(self) -> bool:
        """True for the twin over state."""
        return bool(self.mutates)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Parameter names in order."""
        return tuple(inspect.signature(self.reference).parameters)

    def is_capture_safe(self, provider: str) -> bool:
        """Whether a call by this provider is `capture_safe`, see `Kernel`; an opaque reference looks at values."""
        return not self.opaque if provider == REFERENCE else self.kernels[provider].capture_safe

    def arguments(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Positional and keyword arguments as one dictionary by parameter name, defaults filled in."""
        bound = inspect.signature(self.reference).bind(*args, **kwargs)
        bound.apply_defaults()
        return dict(bound.arguments)

    def kernel(
        self,
        provider: str,
        supports: SupportFunction = lambda **_: None,
        *,
        fuses_with_neighbours: bool = False,
        batch_invariant: bool = False,
        capture_safe: bool = True,
        plan_facts: FactsFunction | None = None,
    ) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Register an implementation; its signature must be the op's own."""

        def register(function: Callable[..., Any]) -> Callable[..., Any]:
            if tuple(inspect.signature(function).parameters) != self.parameters:
                raise TypeError(f"kernel {provider!r} of op {self.name!r} must take exactly {self.parameters}")
            traits = (fuses_with_neighbours, batch_invariant, capture_safe, plan_facts)
            self.kernels[provider] = Kernel(provider, function, supports, *traits)
            return function

        return register

    def with_states(self, cached: "Op") -> Callable[[StateFunction], StateFunction]:
        """Declare the cached twin and, by decoration, the function that says which states it needs."""

        def register(function: StateFunction) -> StateFunction:
            self.cached, self.states = cached, function
            return function

        return register

    def with_samples(self, function: SampleFunction) -> SampleFunction:
        """Declare, by decoration, the arguments every implementation is tested on."""
        self.samples = function
        return function

    def with_work(self, function: WorkFunction) -> WorkFunction:
        """Declare, by decoration, what a call costs."""
        self.work = function
        return function


OPS: dict[str, Op] = {}
"""The op table: every declared op by name."""


def op(
    *,
    tolerance: Mapping[torch.dtype, float] | None = None,
    opaque: bool = False,
    mutates: tuple[str, ...] = (),
    batch_invariant: bool = False,
    rounds_activations: bool = False,
    fake: Callable[..., Any] | None = None,
) -> Callable[[Callable[..., Any]], Op]:
    """Declare an op from its reference function.

    Args:
        tolerance: by dtype, how far a kernel may be from the reference; exact where not given.
        opaque: a compiler must not trace into the reference.
        mutates: parameters updated in place.
        batch_invariant: the reference promises what `Kernel.batch_invariant` says.
        rounds_activations: as `Op.rounds_activations` says.
        fake: shapes and dtypes of the result, needed when the reference looks at values; default: the reference.
    """

    def declare(reference: Callable[..., Any]) -> Op:
        name = reference.__name__
        schema = torch.library.infer_schema(reference, mutates_args=mutates)
        _library.define(name + schema)
        _library.impl(name, reference, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake or reference, lib=_library)
        overload = getattr(torch.ops.autodeploy, name).default
        traits: dict[str, Any] = {
            "opaque": opaque,
            "mutates": mutates,
            "batch_invariant": batch_invariant,
            "rounds_activations": rounds_activations,
        }
        declared = Op(name, reference, overload, **traits, tolerance=dict(tolerance or {}))
        OPS[name] = declared
        return declared

    return declare


def find_op(target: object) -> Op | None:
    """The op a graph node calls, from the node's target; None when it is no op of ours."""
    if isinstance(target, OpOverload) and target.namespace == NAMESPACE:
        return OPS.get(target._schema.name.split("::")[1])
    return None
