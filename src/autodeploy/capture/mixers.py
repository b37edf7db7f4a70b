"""Recurrent mixers behind functions: a model's module-level function that computes a canonical op becomes that op.

Modeling files keep their convolutions, scans and delta rules in functions of conventional signatures, so that faster
packages can take their place. A function with such a signature is a candidate; at its first call of each kind it is run
on small random input beside the op, and only equal numbers make it the op. Anything else is called as it is, and
refused later if it mixes tokens. An argument that hands over earlier state or boundaries is never dropped silently.
"""

import contextlib
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from autodeploy.capture.probe import modeling_modules, replaced
from autodeploy.ops.captured import captured_state
from autodeploy.ops.causal_conv import causal_conv
from autodeploy.ops.delta_rule import delta_rule
from autodeploy.ops.ssm import selective_scan, ssd

FIRST = "x"
"""What the first parameter is called here; functions name it as they like."""
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""How far, as a share of the largest value, a function may be from the op; below float32 it may round on the way."""

Call = dict[str, Any]
_ACTIVATIONS = {
    None: None, "silu": "silu", "swish": "silu", "relu": "relu", "sigmoid": "sigmoid",
    "gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
}  # fmt: skip


@dataclass(frozen=True)
class Interface:
    """A conventional signature and the op behind it.

    Attributes:
        required: parameters, besides the first, that make a function a candidate.
        ignored: parameters that choose a method, not a result.
        absent: parameters that must be None: earlier state, boundaries.
        dims: number of dimensions of the tensors, where given.
        emit: the op's result for a call, in the function's layout.
        example: small random arguments like those of a call, in float32.
        result: what the function returns, made from the op's result: alone, or with the state after it.
    """

    required: frozenset[str]
    ignored: frozenset[str]
    absent: frozenset[str]
    dims: dict[str, int]
    emit: Callable[[Call], Tensor]
    example: Callable[[Call], Call]
    result: Callable[[Tensor, Call], Any]

    def is_candidate(self, parameters: list[str]) -> bool:
        return self.required <= set(parameters[1:]) <= self.required | self.ignored | self.absent


def _emit_conv(call: Call) -> Tensor:
    activation = _ACTIVATIONS[call["activation"]]
    output: Tensor = causal_conv(call[FIRST].transpose(1, 2), call["weight"], call["bias"], activation, None)
    return output.transpose(1, 2)


def _example_conv(call: Call) -> Call:
    taps = int(call["weight"].shape[1])
    return {FIRST: _random(1, 3, taps + 4), "weight": _random(3, taps), "bias": _random(3)}


def _emit_selective(call: Call) -> Tensor:
    x, dt, B, C, z = (
        None if call[name] is None else call[name].transpose(1, 2) for name in (FIRST, "dt", "B", "C", "z")
    )
    output: Tensor = selective_scan(
        x, dt, call["A"], B, C, call["D"], z, call["delta_bias"], bool(call["delta_softplus"]), None
    )
    return output.transpose(1, 2)


def _example_selective(call: Call) -> Call:
    example = {name: _random(1, size, 11) for name, size in ((FIRST, 3), ("dt", 3), ("B", 4), ("C", 4), ("z", 3))}
    example["dt"] = example["dt"].abs()
    return example | {"A": -_random(3, 4).abs(), "D": _random(3), "delta_bias": _random(3)}


def _selective_result(output: Tensor, call: Call) -> Any:
    if not call["return_last_state"]:
        return output
    return output, captured_state(output, [output.shape[0], *call["A"].shape])


def _emit_ssd(call: Call) -> Tensor:
    smallest, largest = call.get("dt_limit") or (0.0, float("inf"))
    output: Tensor = ssd(
        call[FIRST],
        call["dt"],
        call["A"],
        call["B"],
        call["C"],
        call["D"],
        call["dt_bias"],
        bool(call["dt_softplus"]),
        float(smallest),
        None if largest == float("inf") else float(largest),
        None,
    )
    return output


def _example_ssd(call: Call) -> Call:
    example = {FIRST: _random(1, 19, 4, 3), "dt": _random(1, 19, 4).abs(), "A": -_random(4).abs(), "chunk_size": 8}
    return example | {"B": _random(1, 19, 2, 5), "C": _random(1, 19, 2, 5), "D": _random(4), "dt_bias": _random(4)}


def _ssd_result(output: Tensor, call: Call) -> Any:
    if not call["return_final_states"]:
        return output
    return output, captured_state(output, [output.shape[0], *output.shape[2:], call["B"].shape[-1]])


def _emit_delta(call: Call) -> Tensor:
    query, scale = call[FIRST], call.get("scale")
    output: Tensor = delta_rule(
        query,
        call["key"],
        call["value"],
        call["beta"],
        call["g"],
        float(query.shape[-1] ** -0.5 if scale is None else scale),
        1e-6 if call.get("use_qk_l2norm_in_kernel") else None,
        None,
    )
    return output


def _example_delta(call: Call) -> Call:
    heads = 4 if call["value"].shape[2] != call["key"].shape[2] else 2
    example = {FIRST: _random(1, 19, 2, 4), "key": _random(1, 19, 2, 4) / 4, "value": _random(1, 19, heads, 3)}
    decay = -_random(1, 19, heads, *([4] if call["g"] is not None and call["g"].dim() == 4 else [])).abs()
    return example | {"beta": _random(1, 19, heads).abs().clamp(max=1.0), "g": decay, "chunk_size": 8}


def _delta_result(output: Tensor, call: Call) -> Any:
    if not call["output_final_state"]:
        return output, None
    return output, captured_state(output, [output.shape[0], output.shape[2], call["key"].shape[3], output.shape[3]])


def _random(*shape: int) -> Tensor:
    seed = sum(size * 7**index for index, size in enumerate(shape))
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _cast(value: Any, like: Any) -> Any:
    return value.to(like.dtype) if isinstance(value, Tensor) and isinstance(like, Tensor) else value


_SEQUENCE = frozenset({"cu_seqlens", "seq_idx"})
INTERFACES = (
    Interface(
        required=frozenset({"weight", "bias", "activation"}),
        ignored=frozenset(),
        absent=_SEQUENCE | {"initial_states", "final_states_out"},
        dims={FIRST: 3, "weight": 2, "bias": 1},
        emit=_emit_conv,
        example=_example_conv,
        result=lambda output, call: output,
    ),
    Interface(
        required=frozenset({"dt", "A", "B", "C", "D", "z", "delta_bias", "delta_softplus"}),
        ignored=frozenset({"return_last_state", "use_mambapy", "use_associative_scan"}),
        absent=_SEQUENCE,
        dims={FIRST: 3, "dt": 3, "A": 2, "B": 3, "C": 3, "D": 1, "z": 3, "delta_bias": 1},
        emit=_emit_selective,
        example=_example_selective,
        result=_selective_result,
    ),
    Interface(
        required=frozenset({"dt", "A", "B", "C", "D", "dt_bias", "dt_softplus", "chunk_size"}),
        ignored=frozenset({"return_final_states", "dt_limit"}),
        absent=_SEQUENCE | {"initial_states", "z"},
        dims={FIRST: 4, "dt": 3, "A": 1, "B": 4, "C": 4, "D": 1, "dt_bias": 1},
        emit=_emit_ssd,
        example=_example_ssd,
        result=_ssd_result,
    ),
    Interface(
        required=frozenset({"key", "value", "g", "beta"}),
        ignored=frozenset({"chunk_size", "output_final_state", "use_qk_l2norm_in_kernel", "scale"}),
        absent=_SEQUENCE | {"initial_state"},
        dims={FIRST: 4, "key": 4, "value": 4, "beta": 3},
        emit=_emit_delta,
        example=_example_delta,
        result=_delta_result,
    ),
)


@contextlib.contextmanager
def mixers_recognised(model: nn.Module) -> Iterator[None]:
    """While open, functions of the model's modeling files that compute a recurrent op emit it."""
    with contextlib.ExitStack() as stack:
        for namespace in {id(vars(module)): vars(module) for module in modeling_modules(model)}.values():
            for name, function in list(namespace.items()):
                interface = interface_of(function)
                if interface is not None:
                    stack.enter_context(replaced(namespace, name, Recogniser(function, interface)))
        yield


def interface_of(function: object) -> Interface | None:
    """The interface whose signature a function has, or None."""
    if not isinstance(function, FunctionType):
        return None
    parameters = inspect.signature(inspect.unwrap(function)).parameters.values()
    names = [p.name for p in parameters if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    return next((interface for interface in INTERFACES if names and interface.is_candidate(names)), None)


@dataclass
class Recogniser:
    """Stands in for a function: calls that the op computes emit the op, the others reach the function.

    `verdicts` remembers, by what a call looks like, the dtype of the result where the numbers agreed and None where
    they did not.
    """

    function: Callable[..., Any]
    interface: Interface
    verdicts: dict[object, torch.dtype | None] = field(default_factory=dict)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = self._bind(args, kwargs)
        dtype = None if call is None else self._verdict(call)
        if call is None or dtype is None:
            return self.function(*args, **kwargs)
        return self.interface.result(self.interface.emit(call).to(dtype), call)

    def _bind(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        """The call by parameter name, or None when it is none that the op could stand for.

        Keywords without a parameter of their own are what layers pass through to each other; one that speaks of
        boundaries or of earlier state still rules the op out.
        """
        signature = inspect.signature(inspect.unwrap(self.function))
        known = {name: value for name, value in kwargs.items() if name in signature.parameters}
        call = signature.bind(*args, **known)
        call.apply_defaults()
        first = next(iter(signature.parameters))
        named = {FIRST if name == first else name: value for name, value in call.arguments.items()}
        handed_over = named | kwargs
        if any(handed_over.get(name) is not None for name in self.interface.absent):
            return None
        fits = all(
            isinstance(named.get(name), Tensor | None) and (named.get(name) is None or named[name].dim() == dim)
            for name, dim in self.interface.dims.items()
        )
        return named if fits and named.get("activation") in _ACTIVATIONS else None

    def _verdict(self, call: Call) -> torch.dtype | None:
        """The dtype of the function's result where it is the op's, else None; probed once per kind of call."""
        with _disable_current_modes(), torch.no_grad():
            example = self.interface.example(call)
            options = {name: value for name, value in call.items() if not isinstance(value, Tensor | dict)}
            key = (
                *((name, repr(value)) for name, value in options.items()),
                *((name, value.dtype) for name, value in call.items() if isinstance(value, Tensor)),
                *((name, value.shape) for name, value in example.items() if isinstance(value, Tensor)),
            )
            if key not in self.verdicts:
                self.verdicts[key] = self._probe(call, options | example)
            return self.verdicts[key]

    def _probe(self, call: Call, example: Call) -> torch.dtype | None:
        """Function and op side by side, in float32 and in the call's own dtypes."""
        exact = {name: value if call.get(name) is not None else None for name, value in example.items()}
        own = {name: _cast(value, call[name]) if name in call else value for name, value in exact.items()}
        result = self._run(own)
        agrees = self._agrees(exact, self._run(exact), torch.float32)
        agrees = agrees and self._agrees(own, result, call[FIRST].dtype)
        return result.dtype if agrees and result is not None else None

    def _run(self, example: Call) -> Tensor | None:
        function = inspect.unwrap(self.function)
        parameters = inspect.signature(function).parameters
        first = next(iter(parameters))
        arguments = {name: value for name, value in example.items() if name in parameters and name != first}
        try:
            result = function(example[FIRST], **arguments)
        except Exception:
            return None
        result = result[0] if isinstance(result, tuple) else result
        return result if isinstance(result, Tensor) else None

    def _agrees(self, example: Call, result: Tensor | None, dtype: torch.dtype) -> bool:
        expected = self.interface.emit(example)
        if result is None or result.shape != expected.shape:
            return False
        scale = float(expected.float().abs().max())
        distance = float((result.float() - expected.float()).abs().max())
        return scale > 0 and distance <= TOLERANCE.get(dtype, 1e-4) * scale
