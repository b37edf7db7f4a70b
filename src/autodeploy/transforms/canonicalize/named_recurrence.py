"""A recurrence as calls of named ops: found by running its step beside the step of each op, and runnable itself."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from autodeploy.ops.recurrence import recurrence
from autodeploy.ops.token_shift import token_shift
from autodeploy.transforms.canonicalize.loop_step import Form, Probe, Ref, Role, Shape, Step, drawn
from autodeploy.transforms.canonicalize.recurrence_forms import Call, find_call

LEAST = 1.1754944e-38
"""what a decay is taken to be at least before its logarithm is taken: the smallest normal float32"""


def named_recurrence(
    step: Step,
    tokens: Sequence[Form],
    constants: Sequence[Form],
    carried: Sequence[Form],
    starts: Sequence[float | None],
) -> "NamedRecurrence | None":
    """The named ops that compute a step, one carried value after the other; None unless they compute all of it.

    They are compared with the recurrence itself at last.

    Args:
        starts: the number that each carried value starts from everywhere, or None.
    """
    probe = Probe.of(step, tokens, constants, carried)
    calls: list[Call] = []
    waiting = list(range(len(step.carries)))
    while waiting:
        call = next(filter(None, (find_call(probe, index) for index in waiting)), None)
        if call is None or any(starts[index] != 0.0 for index in call.starts_at_zero):
            return None
        calls.append(call)
        probe.known |= call.known
        waiting = [index for index in waiting if index not in call.holds]
    if step.reads(step.outputs, probe.known):
        return None
    given = {
        (kind, index): torch.zeros(shape, dtype=dtype)
        for kind, forms in (("x", tokens), ("c", constants), ("h", carried))
        for index, (shape, dtype) in enumerate(forms)
    }
    values = dict(zip([c.gives for c in calls], step.evaluate([c.gives for c in calls], given), strict=True))
    dtypes = {ref: value.dtype for ref, value in values.items()}
    shapes = {ref: tuple(value.shape) for ref, value in values.items()}
    named = NamedRecurrence(step, tuple(calls), dtypes, shapes)
    initial = [torch.full(shape, start or 0.0) for (shape, _), start in zip(carried, starts, strict=True)]
    return named if named.agrees(tokens, constants, initial) else None


@dataclass(frozen=True)
class NamedRecurrence:
    """A recurrence as calls of named ops, in the order in which they need each other."""

    step: Step
    calls: tuple[Call, ...]
    dtypes: Mapping[Ref, torch.dtype]
    shapes: Mapping[Ref, Shape]

    def __call__(self, tokens: Sequence[Tensor], constants: Sequence[Tensor], cu_seqlens: Tensor | None) -> Tensor:
        """What `recurrence` gives for the same tokens, constants and boundaries."""
        rows: dict[Ref, Tensor] = {("x", index): tensor.select(0, 0) for index, tensor in enumerate(tokens)}
        shared: dict[Ref, Tensor] = {("c", index): tensor for index, tensor in enumerate(constants)}
        for call in self.calls:
            wide = self.dtypes[call.gives]
            arguments = self._arguments(call, rows, shared)
            constant = {name: self._shared(role, shared) for name, role in call.constants.items()}
            result = call.op(**arguments, **constant, **call.facts, cu_seqlens=cu_seqlens)
            rows[call.gives] = result.reshape(tokens[0].shape[1], *self.shapes[call.gives]).to(wide)
            if call.gives_all:
                before = token_shift(rows[call.gives].unsqueeze(0), 1, None, cu_seqlens)
                rows["h", call.holds[0]] = before.select(0, 0)

        def outputs(values: dict[Ref, Tensor]) -> tuple[Tensor, ...]:
            found = self.step.evaluate(self.step.outputs, values)
            return tuple(value.reshape(-1) for value in found)

        return torch.cat(_each_token(outputs, rows, shared), dim=1).unsqueeze(0)

    def agrees(self, tokens: Sequence[Form], constants: Sequence[Form], starts: Sequence[Tensor]) -> bool:
        """Whether it gives what `recurrence` gives, on two sequences of random tokens, in float32."""
        generator = torch.Generator().manual_seed(1)
        has_decays = any(role.log for call in self.calls for role in call.tokens.values())  # those are positive
        rows, shared = (
            [drawn(shape, dtype, generator, torch.float32, positive=has_decays) for shape, dtype in forms]
            for forms in ([((1, 7, *shape), dtype) for shape, dtype in tokens], constants)
        )
        borders = torch.tensor([0, 2, 7], dtype=torch.int32)
        wide = NamedRecurrence(
            self.step.widened("float32"), self.calls, dict.fromkeys(self.dtypes, torch.float32), self.shapes
        )
        expected = recurrence.reference(rows, shared, starts, wide.step.body.text(), borders)
        distance = (wide(rows, shared, borders) - expected).abs().max()
        return bool(distance <= 1e-3 * expected.abs().max())

    def _arguments(self, call: Call, rows: dict[Ref, Tensor], shared: dict[Ref, Tensor]) -> dict[str, Tensor]:
        """The arguments that tokens have of their own, `[1, T, ...]`, at least as wide as the result."""

        def roles(values: dict[Ref, Tensor]) -> tuple[Tensor, ...]:
            token = values["x", 0]
            refs = [role.ref for role in call.tokens.values() if role.ref is not None]
            known = dict(zip(refs, self.step.evaluate(refs, values), strict=True))
            return tuple(
                _as_argument(role, token if role.ref is None else known[role.ref], self.dtypes[call.gives])
                for role in call.tokens.values()
            )

        found = _each_token(roles, rows, shared)
        return {name: part.unsqueeze(0) for name, part in zip(call.tokens, found, strict=True)}

    def _shared(self, role: Role, shared: dict[Ref, Tensor]) -> Tensor:
        assert role.ref is not None
        (value,) = self.step.evaluate([role.ref], shared)
        return role.of(value)


def _as_argument(role: Role, value: Tensor, dtype: torch.dtype) -> Tensor:
    argument = role.of(value)
    argument = argument.to(torch.promote_types(argument.dtype, dtype))
    return argument.float().clamp_min(LEAST).log() if role.log and role.ref is not None else argument


def _each_token(
    function: Callable[[dict[Ref, Tensor]], tuple[Tensor, ...]], rows: dict[Ref, Tensor], shared: dict[Ref, Tensor]
) -> tuple[Tensor, ...]:
    """A function of one token's values, for all rows `[T, ...]` at once."""

    def one(*values: Tensor) -> tuple[Tensor, ...]:
        return function(dict(zip(rows, values, strict=True)) | shared)

    result: tuple[Tensor, ...] = torch.func.vmap(one)(*rows.values())
    return result
