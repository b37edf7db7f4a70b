"""A recurrence given as text: any loop over tokens that carries values, run over packed sequences and over slots.

A model's own Python loop over time becomes this op (`transforms/canonicalize/roll_loops.py`): its body is a list of
ATen calls, written down as JSON, and what the loop carries from one token to the next is the state. It runs token by
token; recurrences with a name have ops of their own, and those do better.
"""

import functools
import itertools
import json
import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from autodeploy.ops.op import op
from autodeploy.ops.state import SlotState, StateSpec


@dataclass(frozen=True)
class Body:
    """One step of a recurrence.

    Attributes:
        calls: `(operator, args, kwargs)` in order. An operator is `namespace.name.overload`, or `getitem`; an argument
            that is a list of a letter and a number is a value: `["x", i]` the token's slice of the i-th token tensor,
            `["c", i]` the i-th constant, `["h", i]` the i-th carried value, `["n", i]` the result of the i-th call.
            Other values are wrapped: `{"list": [...]}`, `{"torch": "float32"}`, `{"device": "tokens"}` for the device
            of the tokens.
        carries: what each carried value becomes, as values.
        outputs: what the step gives out, as values.
    """

    calls: tuple[tuple[str, Any, Any], ...]
    carries: tuple[Any, ...]
    outputs: tuple[Any, ...]

    def text(self) -> str:
        """As an op's argument."""
        return json.dumps([self.calls, self.carries, self.outputs])

    def step(
        self, tokens: Sequence[Tensor], constants: Sequence[Tensor], carried: Sequence[Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Run one step; returns the outputs and what is carried on."""
        values: dict[tuple[str, int], Any] = {}
        for kind, tensors in (("x", tokens), ("c", constants), ("h", carried)):
            values.update({(kind, index): tensor for index, tensor in enumerate(tensors)})
        for index, call in enumerate(self.calls):
            values["n", index] = call_operator(call, values)
        return [_value(ref, values) for ref in self.outputs], [_value(ref, values) for ref in self.carries]


@functools.lru_cache(maxsize=256)
def parse_body(text: str) -> Body:
    """The body that `Body.text` wrote."""
    calls, carries, outputs = json.loads(text)
    return Body(tuple((name, args, kwargs) for name, args, kwargs in calls), tuple(carries), tuple(outputs))


def call_operator(call: tuple[str, Any, Any], values: Mapping[tuple[str, int], Any]) -> Any:
    """The result of one call of a body, given its values by kind and number."""
    name, args, kwargs = call
    arguments = [_value(argument, values) for argument in args]
    return _operator(name)(*arguments, **{key: _value(value, values) for key, value in kwargs.items()})


def _value(argument: Any, values: Mapping[tuple[str, int], Any]) -> Any:
    match argument:
        case [str() as kind, int() as index]:
            return values[kind, index]
        case {"list": parts}:
            return [_value(part, values) for part in parts]
        case {"torch": name}:
            return getattr(torch, name)
        case {"device": _}:
            return values["x", 0].device
        case _:
            return argument


@functools.cache
def _operator(name: str) -> Any:
    return operator.getitem if name == "getitem" else functools.reduce(getattr, name.split("."), torch.ops)


def _run(
    body: Body, tokens: list[Tensor], constants: list[Tensor], carried: list[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    """All tokens `[n, *shape]` of one sequence; outputs `[n, F]` and what is carried at the end."""
    rows = []
    for token in zip(*(tensor.unbind(0) for tensor in tokens), strict=True):
        outputs, carried = body.step(token, constants, carried)
        rows.append(_flat(outputs))
    return torch.stack(rows), carried


def _flat(values: Sequence[Tensor]) -> Tensor:
    return torch.cat([value.reshape(-1) for value in values])


def _unflat(vector: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    parts = vector.split([tensor.numel() for tensor in like])
    return [part.reshape(tensor.shape).to(tensor.dtype) for part, tensor in zip(parts, like, strict=True)]


def _fake(
    tokens: list[Tensor], constants: list[Tensor], initial: list[Tensor], body: str, cu_seqlens: Tensor | None
) -> Tensor:
    outputs, _ = parse_body(body).step([tensor[0, 0] for tensor in tokens], constants, initial)
    width = sum(output.numel() for output in outputs)
    return outputs[0].new_empty(1, tokens[0].shape[1], width)


@op(opaque=True, fake=_fake)
def recurrence(
    tokens: list[Tensor], constants: list[Tensor], initial: list[Tensor], body: str, cu_seqlens: Tensor | None
) -> Tensor:
    """`outputs_t, carried_t = body(tokens_t, constants, carried_(t-1))`, each packed sequence by itself.

    Args:
        tokens: each `[1, T, *shape]`.
        constants: what every step reads, any shapes.
        initial: what is carried into a sequence's first token, any shapes.
        body: the step, as `Body.text` writes it.
        cu_seqlens: int `[S+1]`; None means the row is one sequence.
    Returns:
        `[1, T, F]`: each step's outputs, flattened one after the other.
    """
    parsed = parse_body(body)
    borders = [0, tokens[0].shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    parts = [
        _run(parsed, [tensor[0, start:end] for tensor in tokens], constants, initial)[0]
        for start, end in itertools.pairwise(borders)
        if end > start
    ]
    return torch.cat(parts)[None]


def _cached_fake(
    tokens: list[Tensor],
    constants: list[Tensor],
    initial: list[Tensor],
    body: str,
    cu_seqlens: Tensor | None,
    seq_lens: Tensor,
    state_slots: Tensor,
    carried: Tensor,
) -> Tensor:
    return _fake(tokens, constants, initial, body, cu_seqlens)


@op(opaque=True, fake=_cached_fake, mutates=("carried",))
def cached_recurrence(
    tokens: list[Tensor],
    constants: list[Tensor],
    initial: list[Tensor],
    body: str,
    cu_seqlens: Tensor | None,
    seq_lens: Tensor,
    state_slots: Tensor,
    carried: Tensor,
) -> Tensor:
    """`recurrence` of new tokens, each `[1, T, *shape]`, continued from `carried` `[slots, total]` (float32)."""
    parsed = parse_body(body)
    borders = [0, tokens[0].shape[1]] if cu_seqlens is None else cu_seqlens.tolist()
    slots, lengths, parts = state_slots.tolist(), seq_lens.tolist(), []
    for index, (start, end) in enumerate(itertools.pairwise(borders)):
        if end == start:
            continue
        is_new = lengths[index] == end - start
        before = initial if is_new else _unflat(carried[slots[index]], initial)
        output, after = _run(parsed, [tensor[0, start:end] for tensor in tokens], constants, before)
        carried[slots[index]] = _flat([value.float() for value in after])
        parts.append(output)
    return torch.cat(parts)[None]


@recurrence.with_states(cached_recurrence)
def _states(initial: list[Tensor], **_: Any) -> dict[str, StateSpec]:
    total = sum(math.prod(tensor.shape) for tensor in initial)
    return {"carried": SlotState(name="carried", shape=(total,), dtype=torch.float32, shard_dim=None)}


@recurrence.with_samples
def _samples() -> list[dict[str, Any]]:
    x, z = ["x", 0], ["x", 1]
    gated_sum = Body(
        calls=(
            ("aten.mul.Tensor", [["c", 0], ["h", 0]], {}),
            ("aten.add.Tensor", [["n", 0], x], {}),
            ("aten.mul.Tensor", [["n", 1], z], {}),
            ("aten.maximum.default", [["h", 1], ["n", 2]], {}),
        ),
        carries=(["n", 1], ["n", 3]),
        outputs=(["n", 2], ["n", 3]),
    )
    boundaries = torch.tensor([0, 1, 10, 24], dtype=torch.int32)
    return [
        {
            "tokens": [torch.randn(1, 24, 1, 8), torch.randn(1, 24, 1, 8)],
            "constants": [torch.rand(8)],
            "initial": [torch.randn(1, 8), torch.full((1, 8), -3.0)],
            "body": gated_sum.text(),
            "cu_seqlens": boundaries,
        },
        {
            "tokens": [torch.randn(1, 24, 4, 8)],
            "constants": [torch.randn(8, 4, 8) / 4],
            "initial": [torch.zeros(8), torch.zeros(8), torch.zeros(8), torch.zeros(8)],
            "body": _scalar_memory().text(),
            "cu_seqlens": boundaries,
        },
    ]


def _scalar_memory() -> Body:
    """An sLSTM's cell (arXiv 2405.04517): its gates read what it gave last, through a matrix."""
    output, memory, size, level = (["h", index] for index in range(4))
    update, enter, forget, leave = (["n", index] for index in (3, 4, 5, 6))
    return Body(
        calls=(
            ("aten.einsum.default", ["d,dge->ge", {"list": [output, ["c", 0]]}], {}),
            ("aten.add.Tensor", [["x", 0], ["n", 0]], {}),
            ("aten.unbind.int", [["n", 1], 0], {}),
            *(("getitem", [["n", 2], gate], {}) for gate in range(4)),
            ("aten.log_sigmoid.default", [forget], {}),
            ("aten.add.Tensor", [["n", 7], level], {}),
            ("aten.maximum.default", [["n", 8], enter], {}),
            ("aten.sub.Tensor", [["n", 8], ["n", 9]], {}),
            ("aten.exp.default", [["n", 10]], {}),
            ("aten.sub.Tensor", [enter, ["n", 9]], {}),
            ("aten.exp.default", [["n", 12]], {}),
            ("aten.tanh.default", [update], {}),
            ("aten.mul.Tensor", [["n", 11], memory], {}),
            ("aten.addcmul.default", [["n", 15], ["n", 13], ["n", 14]], {}),
            ("aten.mul.Tensor", [["n", 11], size], {}),
            ("aten.add.Tensor", [["n", 17], ["n", 13]], {}),
            ("aten.sigmoid.default", [leave], {}),
            ("aten.mul.Tensor", [["n", 19], ["n", 16]], {}),
            ("aten.div.Tensor", [["n", 20], ["n", 18]], {}),
        ),
        carries=(["n", 21], ["n", 16], ["n", 18], ["n", 9]),
        outputs=(["n", 21],),
    )
