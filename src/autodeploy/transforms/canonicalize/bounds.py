"""What a value cannot fall below: a node of a graph goes in, a bound that holds for all weights and tokens comes out.

Functions with a limited range (exp, sigmoid, softplus, ...) give bounds, arithmetic keeps them, moving elements about
changes nothing; everything else could be any number.
"""

import math
from collections.abc import Mapping

import torch
from torch import fx

aten = torch.ops.aten

Interval = tuple[float, float]

ANYTHING: Interval = (-math.inf, math.inf)
_RANGES: dict[object, Interval] = {
    aten.exp.default: (0.0, math.inf),
    aten.exp2.default: (0.0, math.inf),
    aten.sigmoid.default: (0.0, 1.0),
    aten.softplus.default: (0.0, math.inf),
    aten.relu.default: (0.0, math.inf),
    aten.abs.default: (0.0, math.inf),
    aten.square.default: (0.0, math.inf),
    aten.sqrt.default: (0.0, math.inf),
    aten.tanh.default: (-1.0, 1.0),
    aten.softmax.int: (0.0, 1.0),
}
_MOVES = (
    aten.view.default,
    aten.view_as.default,
    aten.expand_as.default,
    aten.type_as.default,
    aten.reshape.default,
    aten.reshape_as.default,
    aten._unsafe_view.default,
    aten.unflatten.int,
    aten.flatten.using_ints,
    aten.permute.default,
    aten.transpose.int,
    aten.t.default,
    aten.squeeze.default,
    aten.squeeze.dim,
    aten.unsqueeze.default,
    aten.expand.default,
    aten.select.int,
    aten.slice.Tensor,
    aten.repeat.default,
    aten.repeat_interleave.self_int,
    aten.clone.default,
    aten.contiguous.default,
    aten.alias.default,
    aten.detach.default,
    aten.to.dtype,
    aten._to_copy.default,
)


def bounds(value: object, outside: Mapping[fx.Node, fx.Node] | None = None) -> Interval:
    """The least and the largest that a value can be; `outside` says what the inputs of a traced piece stand for."""
    outside = outside or {}
    if isinstance(value, bool | int | float):
        return float(value), float(value)
    if not isinstance(value, fx.Node):
        return ANYTHING
    if value in outside:
        return bounds(outside[value])
    if value.op != "call_function":
        return ANYTHING
    if value.target in _RANGES:
        return _RANGES[value.target]
    parts = [bounds(argument, outside) for argument in value.args[:2]]
    if value.target in _MOVES:
        return parts[0]
    if value.kwargs or len(value.args) > 2:
        return ANYTHING
    if value.target == aten.neg.default:
        return _negative(parts[0])
    if value.target in (aten.add.Tensor, aten.add.Scalar):
        return _sum(*parts)
    if value.target in (aten.sub.Tensor, aten.sub.Scalar):
        return _sum(parts[0], _negative(parts[1]))
    if value.target in (aten.rsub.Scalar, aten.rsub.Tensor):
        return _sum(parts[1], _negative(parts[0]))
    if value.target in (aten.mul.Tensor, aten.mul.Scalar):
        corners = [0.0 if 0.0 in (a, b) else a * b for a in parts[0] for b in parts[1]]
        return min(corners), max(corners)
    return ANYTHING


def _negative(one: Interval) -> Interval:
    return -one[1], -one[0]


def _sum(one: Interval, other: Interval) -> Interval:
    return one[0] + other[0], one[1] + other[1]
