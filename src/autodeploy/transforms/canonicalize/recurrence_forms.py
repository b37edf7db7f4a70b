"""Recurrences that have a name: a step on random numbers goes in, the call of an op that computes it comes out.

Each form says what the op does to a state in one step; a step is one of it when its numbers are. How the step is
written, which axis is which, and what the model calls its parts does not matter.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from autodeploy.ops import (
    Op,
    delta_rule,
    generalized_delta_rule,
    linear_attention,
    linear_recurrence,
    token_shift,
    wkv,
)
from autodeploy.transforms.canonicalize.loop_step import Probe, Ref, Role, Shape, find_role, is_same

Roles = list[tuple[Role, Tensor]]


@dataclass(frozen=True)
class Call:
    """A call of an op whose result, token by token, is a value of a step.

    Attributes:
        tokens: arguments that each token has its own of. constants: arguments that all share.
        facts: the other arguments.
        gives: the value that the result stands for.
        holds: the carried values that the op keeps, by number.
        gives_all: the result is the carried value itself, so that what came in is the result of the token before.
    """

    op: Op
    gives: Ref
    holds: tuple[int, ...]
    tokens: dict[str, Role]
    constants: dict[str, Role] = field(default_factory=dict)
    facts: dict[str, object] = field(default_factory=dict)
    gives_all: bool = False

    @property
    def known(self) -> set[Ref]:
        """The values of a step that are known for every token with the result."""
        return {self.gives, ("h", self.holds[0])} if self.gives_all else {self.gives}

    @property
    def starts_at_zero(self) -> tuple[int, ...]:
        """The carried values that must be zeros before a sequence's first token."""
        return self.holds[1:] if self.op is wkv else self.holds  # a level of sums that are zero has no meaning


@dataclass(frozen=True)
class _Layout:
    """A carried tensor as matrices `[N, K, V]`: which axis is the key's."""

    shape: Shape
    heads: int
    keys: int
    values: int
    is_key_last: bool = False

    def matrix(self, state: Tensor) -> Tensor:
        if self.is_key_last:
            return state.reshape(self.heads, self.values, self.keys).transpose(1, 2)
        return state.reshape(self.heads, self.keys, self.values)

    def state(self, matrix: Tensor) -> Tensor:
        return (matrix.transpose(1, 2) if self.is_key_last else matrix).reshape(self.shape)

    def key_roles(self, probe: Probe, *, constant: bool = False) -> Roles:
        *leading, rows, columns = self.shape
        full = {True: (*leading, 1, columns), False: (*leading, rows, 1)}[self.is_key_last]
        if self.values == 1:
            full = self.shape
        return probe.roles(full, (self.heads, self.keys), constant=constant)

    def value_roles(self, probe: Probe) -> Roles:
        *leading, rows, columns = self.shape
        full = {True: (*leading, rows, 1), False: (*leading, 1, columns)}[self.is_key_last]
        if self.values == 1:
            full = (*leading, rows, 1)
        return probe.roles(full, (self.heads, self.values))

    def head_roles(self, probe: Probe) -> Roles:
        *leading, rows, _ = self.shape
        full = (*leading, rows, 1) if self.heads == math.prod((*leading, rows)) else (*leading, 1, 1)
        return probe.roles(full, (self.heads, 1))


@dataclass(frozen=True)
class _Affine:
    """What a step does to a carried matrix: `S -> transition @ S + added`, both `[N, K, ...]`."""

    index: int
    layout: _Layout
    transition: Tensor
    added: Tensor
    before: Tensor
    after: Tensor


def find_call(probe: Probe, index: int) -> Call | None:
    """The op that computes a carried value, or None. Looks at values of one carried value alone."""
    carry = probe.step.carries[index]
    reads = probe.step.reads([carry], probe.known)
    if not reads:
        return _previous(probe, index)
    if reads == {("h", index)}:
        for layout in _layouts(tuple(probe.given["h", index].shape)):
            measured = _measured(probe, index, layout)
            if measured is not None:
                found = next(filter(None, (form(probe, measured) for form in _MATRIX_FORMS)), None)
                if found is not None:
                    return found
        return _elementwise(probe, index)
    return _wkv(probe) if len(reads) == 2 else None


def _previous(probe: Probe, index: int) -> Call | None:
    """What is carried is the token's own, so that what comes in is the token's before."""
    shape = tuple(probe.given["h", index].shape)
    role = find_role(probe.roles(shape, shape), probe.value(probe.step.carries[index]))
    if role is None or role.ref is None:
        return None
    return Call(token_shift, ("h", index), (index,), {"x": role}, {}, {"distance": 1, "first": None})


def _layouts(shape: Shape) -> Iterator[_Layout]:
    if len(shape) < 2 or min(shape[-2:]) < 2:
        return
    *leading, rows, columns = shape
    heads = math.prod(leading)
    yield _Layout(shape, heads, rows, columns)
    yield _Layout(shape, heads, columns, rows, is_key_last=True)
    yield _Layout(shape, heads * rows, columns, 1)


def _measured(probe: Probe, index: int, layout: _Layout) -> _Affine | None:
    """Run on zeros, ones and unit vectors, then hold the result to random states, small and large."""

    def step(matrix: Tensor) -> Tensor:
        return layout.matrix(probe.carry(index, layout.state(matrix)))

    before = layout.matrix(probe.given["h", index])
    added = step(torch.zeros_like(before))
    gate = step(torch.ones_like(before)) - added
    if is_same(step(before), gate * before + added):  # every element by itself
        if not is_same(gate[:, :, :1].expand_as(gate), gate):
            return None
        transition = torch.diag_embed(gate[:, :, 0])
    elif is_same(step(2.0 * before) - added, 2.0 * (step(before) - added)):
        transition = _transition(step, before, added)
    else:
        return None
    for scale in (1.0, 1e4):
        if not is_same(step(scale * before), transition @ (scale * before) + added):
            return None
    return _Affine(index, layout, transition, added, before, step(before))


def _transition(step: Callable[[Tensor], Tensor], before: Tensor, added: Tensor) -> Tensor:
    """The matrix `[N, K, K]` that a step multiplies with, if it does: as many unit vectors at once as there is room."""
    heads, keys, values = before.shape
    transition = before.new_zeros(heads, keys, keys)
    for start in range(0, keys, values):
        width = min(values, keys - start)
        unit = torch.zeros_like(before)
        unit[:, start : start + width, :width] = torch.eye(width, dtype=unit.dtype)
        transition[:, :, start : start + width] = (step(unit) - added)[:, :, :width]
    return transition


def _outer(left: Tensor, right: Tensor) -> Tensor:
    return left.unsqueeze(-1) * right.unsqueeze(-2)


def _fading(probe: Probe, layout: _Layout, decay: Tensor) -> Role | None:
    """A decay `[N, K]` as logarithms, one per head where that is enough."""
    per_head = decay[:, :1]
    if is_same(per_head.expand_as(decay), decay):
        role = find_role(layout.head_roles(probe), per_head, log=True)
        if role is not None:
            return role
    return find_role(layout.key_roles(probe), decay, log=True)


def _pairs(measured: _Affine, keys: Roles) -> Iterator[tuple[Role, Tensor, Tensor]]:
    """Keys whose outer product with some value is what a step adds: the role, the key, the value that it takes."""
    for role, key in keys:
        size = key.square().sum(-1, keepdim=True)
        if bool((size > 0).all()):
            value = torch.einsum("nk,nkv->nv", key, measured.added) / size
            if is_same(_outer(key, value), measured.added):
                yield role, key, value


def _reading(probe: Probe, measured: _Affine, keys: Roles) -> tuple[Ref, Role] | None:
    """A value of the step that is `query · S` after it, through which alone the carried matrix is seen."""
    heads, width = measured.layout.heads, measured.layout.values
    for ref, value in _cuts(probe, measured):
        for role, query in keys:
            if is_same(torch.einsum("nk,nkv->nv", query, measured.after), value.reshape(heads, width)):
                return ref, role
    return None


def _cuts(probe: Probe, measured: _Affine) -> Iterator[tuple[Ref, Tensor]]:
    step, index = probe.step, measured.index
    others = [step.carries[j] for j in range(len(step.carries)) if j != index]
    for ref, value in probe.mixed_values(index):
        fits = value.numel() == measured.layout.heads * measured.layout.values
        if fits and ("h", index) not in step.reads([*step.outputs, *others], probe.known | {ref}):
            yield ref, value


def _linear_attention(probe: Probe, measured: _Affine) -> Call | None:
    """The matrix fades and a product is added."""
    fading = measured.transition.diagonal(dim1=-2, dim2=-1)
    if not is_same(torch.diag_embed(fading), measured.transition):
        return None
    layout = measured.layout
    decay = _fading(probe, layout, fading)
    keys = layout.key_roles(probe)
    for key_role, key, added in _pairs(measured, keys) if decay is not None else ():
        value = find_role(layout.value_roles(probe), added)
        if value is None or decay is None:
            continue
        tokens = {"key": key_role, "value": value, "decay": decay}
        reading = _reading(probe, measured, keys)
        if reading is not None:
            tokens["query"] = reading[1]
            return Call(linear_attention, reading[0], (measured.index,), tokens, facts={"bonus": None})
        with_bonus = _bonus(probe, measured, keys, key, added)
        if with_bonus is not None:
            gives, tokens["query"], bonus = with_bonus
            return Call(linear_attention, gives, (measured.index,), tokens, {"bonus": bonus})
    return None


def _bonus(probe: Probe, measured: _Affine, keys: Roles, key: Tensor, value: Tensor) -> tuple[Ref, Role, Role] | None:
    """A value that is `query · (S before + (bonus · key) ⊗ value)`."""
    bonuses = measured.layout.key_roles(probe, constant=True)
    for ref, seen in _cuts(probe, measured):
        for role, query in keys:
            rest = seen.reshape_as(value) - torch.einsum("nk,nkv->nv", query, measured.before)
            for bonus_role, bonus in bonuses:
                if is_same((query * bonus * key).sum(-1, keepdim=True) * value, rest):
                    return ref, role, bonus_role
    return None


def _delta_rule(probe: Probe, measured: _Affine) -> Call | None:
    """The matrix fades, and what it holds under the key moves towards the value."""
    layout = measured.layout
    keys, values = layout.key_roles(probe), layout.value_roles(probe)
    identity = torch.eye(layout.keys, dtype=torch.float64)
    for key_role, key, added in _pairs(measured, keys):
        for value_role, value in values:
            strength = (added * value).sum(-1, keepdim=True) / value.square().sum(-1, keepdim=True)
            correction = identity - strength.unsqueeze(-1) * _outer(key, key)
            fading = measured.transition.diagonal(dim1=-2, dim2=-1) / correction.diagonal(dim1=-2, dim2=-1)
            if not (
                is_same(strength * value, added) and is_same(correction * fading.unsqueeze(1), measured.transition)
            ):
                continue
            beta, decay = find_role(layout.head_roles(probe), strength), _fading(probe, layout, fading)
            reading = _reading(probe, measured, keys)
            if beta is None or decay is None or reading is None:
                continue
            gives, query = reading
            tokens = {
                "query": query,
                "key": key_role,
                "value": value_role,
                "beta": replace(beta, final=(layout.heads,)),
            }
            facts: dict[str, object] = {"scale": 1.0, "norm_eps": None}
            if decay.ref is None and decay.fill == 0.0:
                facts["decay"] = None
            else:
                tokens["decay"] = replace(decay, final=(layout.heads,)) if decay.final[1] == 1 else decay
            return Call(delta_rule, gives, (measured.index,), tokens, facts=facts)
    return None


def _generalized_delta_rule(probe: Probe, measured: _Affine) -> Call | None:
    """The matrix fades, what it holds under one key is added under another, and so is a value under a third."""
    layout = measured.layout
    keys = layout.key_roles(probe)
    reading = _reading(probe, measured, keys)
    pair = next(_pairs(measured, keys), None)
    value = find_role(layout.value_roles(probe), pair[2]) if pair is not None else None
    if reading is None or pair is None or value is None:
        return None
    off_diagonal = 1.0 - torch.eye(layout.keys, dtype=torch.float64)
    for (write_role, write), (read_role, read) in itertools.permutations(keys, 2):
        for sign in (1.0, -1.0):
            moved = sign * _outer(write, read)
            if not is_same(moved * off_diagonal, measured.transition * off_diagonal):
                continue
            decay = find_role(
                layout.key_roles(probe), (measured.transition - moved).diagonal(dim1=-2, dim2=-1), log=True
            )
            if decay is not None:
                write_role = replace(write_role, scale=sign)
                tokens = {"query": reading[1], "key": pair[0], "value": value, "read": read_role, "write": write_role}
                return Call(generalized_delta_rule, reading[0], (measured.index,), tokens | {"decay": decay})
    return None


_MATRIX_FORMS: tuple[Callable[[Probe, _Affine], Call | None], ...] = (
    _linear_attention,
    _delta_rule,
    _generalized_delta_rule,
)


def _elementwise(probe: Probe, index: int) -> Call | None:
    """Every element is multiplied and added to, by itself."""
    state = probe.given["h", index]
    if state.numel() > sum(probe.value(ref).numel() for ref in probe.step.outputs):
        return None  # the states of all tokens would be held at once
    added = probe.carry(index, torch.zeros_like(state))
    gate = probe.carry(index, torch.ones_like(state)) - added
    for scale in (1.0, 1e4):
        if not is_same(probe.carry(index, scale * state), gate * scale * state + added):
            return None
    shape, flat = tuple(state.shape), (state.numel(),)
    roles = probe.roles(shape, flat)
    x, kept = find_role(roles, added.flatten()), find_role(roles, gate.flatten())
    if x is None or kept is None:
        return None
    tokens = {"x": x, "gate": kept}
    return Call(linear_recurrence, probe.step.carries[index], (index,), tokens, gives_all=True)


def _wkv(probe: Probe) -> Call | None:
    """Two sums relative to the largest weight so far; their quotient is what is seen."""
    for places in itertools.permutations(range(len(probe.step.carries)), 3):
        level, sums, weights = (probe.given["h", index].flatten() for index in places)
        after = [probe.value(probe.step.carries[index]) for index in places]
        if any(value.numel() != level.numel() for value in (sums, weights, *after)):
            continue
        roles = probe.roles(tuple(probe.given["h", places[0]].shape), (level.numel(),))
        constants = probe.roles(tuple(probe.given["h", places[0]].shape), (level.numel(),), constant=True)
        decays = [(replace(role, scale=sign), sign * value) for role, value in constants for sign in (1.0, -1.0)]
        for (decay_role, decay), (key_role, key) in itertools.product(decays, roles):
            most = torch.maximum(level + decay, key)
            kept, fresh = (level + decay - most).exp(), (key - most).exp()
            if not (is_same(most, after[0].flatten()) and is_same(kept * weights + fresh, after[2].flatten())):
                continue
            value = find_role(roles, (after[1].flatten() - kept * sums) / fresh)
            if value is None or value.ref is None:
                continue
            (token,) = (v for role, v in roles if role == value)
            seen = _quotient(probe, places, (level, sums, weights), (key, token), constants)
            if seen is not None:
                constant = {"decay": decay_role, "bonus": seen[1]}
                return Call(wkv, seen[0], places, {"key": key_role, "value": value}, constant)
    return None


def _quotient(
    probe: Probe, places: tuple[int, ...], memory: tuple[Tensor, ...], token: tuple[Tensor, ...], constants: Roles
) -> tuple[Ref, Role] | None:
    """The value that is the weighed mean of what is carried and the token, whose weight a constant raises."""
    (level, sums, weights), (key, value), step = memory, token, probe.step
    for role, bonus in constants:
        most = torch.maximum(level, key + bonus)
        kept, fresh = (level - most).exp(), (key + bonus - most).exp()
        wanted = (kept * sums + fresh * value) / (kept * weights + fresh)
        for number in range(len(step.body.calls)):
            ref = ("n", number)
            found = probe.value(ref)
            is_mean = isinstance(found, Tensor) and found.numel() == wanted.numel() and is_same(found.flatten(), wanted)
            others = [step.carries[j] for j in range(len(step.carries)) if j not in places]
            if is_mean and not {("h", index) for index in places} & step.reads(
                [*step.outputs, *others], probe.known | {ref}
            ):
                return ref, role
    return None
