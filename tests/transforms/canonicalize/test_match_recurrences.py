"""MatchRecurrences: loops as authors write them become named ops by their numbers; near misses stay what they are."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from autodeploy.graph.levels import Level
from autodeploy.graph.verify import verify
from autodeploy.transforms.canonicalize.bind_boundaries import BindBoundaries
from autodeploy.transforms.canonicalize.match_recurrences import MatchRecurrences
from autodeploy.transforms.canonicalize.match_token_shift import MatchTokenShift
from autodeploy.transforms.canonicalize.roll_loops import RollLoops
from tests.graphs import LENGTHS, Sketch, captured, counts, run
from tests.research_recurrences import WKV4, WKV6, WKV7, NaiveWKV4

Body = Callable[[Sketch, Tensor], Tensor]


def _heads(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Something like queries, keys and values of two heads: `[B, T, 2, 8]`."""
    x = x.unflatten(-1, (2, 8))
    return x, x.sin(), 2.0 * x.cos()


def _lerp(self: Sketch, x: Tensor) -> Tensor:
    """An exponential mean, updated in place."""
    mean, rows = torch.zeros_like(x[:, 0]), []
    gate = torch.sigmoid(self.gate(x))
    for t in range(x.shape[1]):
        mean = gate[:, t] * mean + (1 - gate[:, t]) * x[:, t]
        rows.append(mean.tanh())
    return torch.stack(rows, dim=1)


def _two_states_in_turn(self: Sketch, x: Tensor) -> Tensor:
    """The second state sums up the first, and what came in is given out too."""
    one, two, rows = torch.zeros(x.shape[0], 16), torch.zeros(x.shape[0], 16), []
    for t in range(x.shape[1]):
        before = two
        one = self.decay * one + x[:, t]
        two = 0.5 * two + one
        rows.append(two * x[:, t] + before)
    return torch.stack(rows, dim=1)


def _retention(self: Sketch, x: Tensor) -> Tensor:
    """A constant number fades every state; the state is transposed, and what is read is gated in the loop."""
    q, k, v = _heads(x)
    state, rows = x.new_zeros(x.shape[0], 2, 8, 8), []
    for t in range(x.shape[1]):
        state = 0.9 * state + torch.einsum("bnk,bnv->bnvk", k[:, t], v[:, t])
        rows.append(torch.sigmoid(x[:, t]) * torch.einsum("bnvk,bnk->bnv", state, q[:, t]).flatten(1))
    return torch.stack(rows, dim=1)


def _selective_scan(self: Sketch, x: Tensor) -> Tensor:
    """A decay per channel and state entry; keys and queries that all channels share."""
    state, rows = x.new_zeros(x.shape[0], 16, 4), []
    decay = torch.exp(-nn.functional.softplus(self.gate(x))[..., None] * torch.arange(1.0, 5.0))
    for t in range(x.shape[1]):
        state = decay[:, t] * state + x[:, t, :, None] * x[:, t, None, :4]
        rows.append((state @ x[:, t, 4:8, None]).squeeze(-1) + x[:, t])
    return torch.stack(rows, dim=1)


def _normalised(self: Sketch, x: Tensor) -> Tensor:
    """Linear attention beside the sum of its weights."""
    q, k, v = (part.exp() for part in _heads(x))
    state, size, rows = x.new_zeros(x.shape[0], 2, 8, 8), x.new_zeros(x.shape[0], 2, 8), []
    for t in range(x.shape[1]):
        state = state + k[:, t, :, :, None] * v[:, t, :, None]
        size = size + k[:, t]
        above = (q[:, t, :, None] @ state).squeeze(2)
        rows.append((above / (q[:, t] * size).sum(-1, keepdim=True)).flatten(1))
    return torch.stack(rows, dim=1)


def _gated_delta_rule(self: Sketch, x: Tensor) -> Tensor:
    """The delta rule with a decay per head that its own correction sees."""
    q, k, v = _heads(x)
    k = nn.functional.normalize(k, dim=-1)
    gates = torch.sigmoid(self.gate(x))
    state, rows = x.new_zeros(x.shape[0], 2, 8, 8), []
    for t in range(x.shape[1]):
        state = state * gates[:, t, :2, None, None]
        wrong = v[:, t] - (k[:, t, :, None] @ state).squeeze(2)
        state = state + k[:, t, :, :, None] * (gates[:, t, 2:4, None] * wrong)[:, :, None]
        rows.append((q[:, t, :, None] @ state).flatten(1))
    return torch.stack(rows, dim=1)


def _previous_token(self: Sketch, x: Tensor) -> Tensor:
    before, rows = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        rows.append(x[:, t] - 0.5 * before)
        before = x[:, t]
    return torch.stack(rows, 1)


def _reset(self: Sketch, x: Tensor) -> Tensor:
    """Some tokens, told by a truth value, start anew."""
    state, rows, kept = torch.zeros_like(x[:, 0]), [], x > -0.5
    for t in range(x.shape[1]):
        state = torch.where(kept[:, t], state, 0.0) + x[:, t]
        rows.append(state)
    return torch.stack(rows, dim=1)


def _nothing_carried(self: Sketch, x: Tensor) -> Tensor:
    rows = []
    for t in range(x.shape[1]):
        rows.append(self.gate(x[:, t]).tanh() * self.decay)
    return torch.stack(rows, 1)


NAMED: dict[Body, dict[str, int]] = {
    _lerp: {"linear_recurrence": 1},
    _two_states_in_turn: {"linear_recurrence": 2},
    _retention: {"linear_attention": 1},
    _selective_scan: {"linear_attention": 1},
    _normalised: {"linear_attention": 2},
    _gated_delta_rule: {"delta_rule": 1},
    _nothing_carried: {"token_shift": 0},
    _previous_token: {"token_shift": 1, "linear_recurrence": 0},
}


def _nonlinear(self: Sketch, x: Tensor) -> Tensor:
    state, rows = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        state = torch.tanh(self.decay * state + x[:, t])
        rows.append(state)
    return torch.stack(rows, dim=1)


def _clamped_far_out(self: Sketch, x: Tensor) -> Tensor:
    state, rows = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        state = (self.decay * state + x[:, t]).clamp(-1e3, 1e3)
        rows.append(state)
    return torch.stack(rows, dim=1)


def _starts_elsewhere(self: Sketch, x: Tensor) -> Tensor:
    state, rows = self.start.expand(x.shape[0], 16), []
    for t in range(x.shape[1]):
        state = self.decay * state + x[:, t]
        rows.append(state)
    return torch.stack(rows, dim=1)


def _mixes_channels(self: Sketch, x: Tensor) -> Tensor:
    state, rows = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        state = self.decay * torch.cat(state.chunk(2, -1)[::-1], -1) + x[:, t]
        rows.append(state)
    return torch.stack(rows, dim=1)


def _decay_of_any_sign(self: Sketch, x: Tensor) -> Tensor:
    """No logarithm says what fades the state: it may be negative."""
    q, k, v = _heads(x)
    state, rows = x.new_zeros(x.shape[0], 2, 8, 8), []
    for t in range(x.shape[1]):
        state = self.decay[:8, None] * state + k[:, t, :, :, None] * v[:, t, :, None]
        rows.append((q[:, t, :, None] @ state).flatten(1))
    return torch.stack(rows, dim=1)


def _read_twice(self: Sketch, x: Tensor) -> Tensor:
    q, k, v = _heads(x)
    state, rows = x.new_zeros(x.shape[0], 2, 8, 8), []
    for t in range(x.shape[1]):
        state = 0.9 * state + k[:, t, :, :, None] * v[:, t, :, None]
        rows.append((q[:, t, :, None] @ state + state.abs().amax(2, keepdim=True)).flatten(1))
    return torch.stack(rows, dim=1)


LEFT = [
    _reset,
    _nonlinear,
    _clamped_far_out,
    _starts_elsewhere,
    _mixes_channels,
    _decay_of_any_sign,
    _read_twice,
]


def _mixer(module: nn.Module) -> Sketch:
    model = Sketch(lambda self, x: self.mixer(x), mixer=module)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter + 0.1 * torch.randn(parameter.shape))
    return model.eval()


def _sketch(body: Body) -> Sketch:
    model = Sketch(
        body, decay=nn.Parameter(torch.rand(16) - 0.5), gate=nn.Linear(16, 16), start=nn.Parameter(torch.randn(16))
    )
    return model.eval()


def _holds(model: Sketch, ops: dict[str, int], rewritten: int) -> None:
    """The graph has these recurrent ops and the model's own numbers for packed sequences."""
    graph = captured(model)
    RollLoops().run(graph)
    report = MatchRecurrences().run(graph)
    assert (report.found, report.rewritten) == (1, rewritten)
    MatchTokenShift().run(graph)
    BindBoundaries().run(graph)
    found = counts(graph)
    assert {name: found[name] for name in ("recurrence", *ops)} == {"recurrence": 1 - rewritten} | ops
    verify(graph, Level.CANONICAL)
    ids = torch.randint(0, 32, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        alone = torch.cat([model(row) for row in ids.split(LENGTHS, dim=1)], dim=1)
    torch.testing.assert_close(run(graph, model), alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("body", NAMED, ids=lambda body: body.__name__.strip("_"))
def test_a_step_is_known_by_its_numbers(body: Body) -> None:
    _holds(_sketch(body), NAMED[body], 1)


@pytest.mark.parametrize(
    ("mixer", "ops"),
    [
        (lambda: WKV4(16), {"wkv": 1}),
        (lambda: NaiveWKV4(16), {"linear_recurrence": 2}),
        (lambda: WKV6(16, 2, 8), {"linear_attention": 1}),
        (lambda: WKV7(16, 2, 8), {"generalized_delta_rule": 1}),
    ],
    ids=["wkv4", "naive_wkv4", "wkv6", "wkv7"],
)
def test_mixers_of_papers(mixer: Callable[[], nn.Module], ops: dict[str, int]) -> None:
    torch.manual_seed(0)
    _holds(_mixer(mixer()), ops, 1)


@pytest.mark.parametrize("body", LEFT, ids=lambda body: body.__name__.strip("_"))
def test_what_is_no_named_op_stays_a_recurrence(body: Body) -> None:
    _holds(_sketch(body), {}, 0)


def test_a_loop_that_rounds_its_state_is_the_same_op() -> None:
    """The op's state is wider than the loop's, and the result no further from float32 than the loop's own."""
    model = _sketch(_retention)
    graph = captured(_sketch(_retention).bfloat16())
    RollLoops().run(graph)
    assert MatchRecurrences().run(graph).rewritten == 1
    narrow = _sketch(_retention).bfloat16()
    ids = torch.randint(0, 32, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        alone = torch.cat([model.bfloat16().float()(row) for row in ids.split(LENGTHS, dim=1)], dim=1)
    result = run(graph, narrow)
    assert result.dtype == torch.bfloat16
    torch.testing.assert_close(result.float(), alone, rtol=0.05, atol=0.05 * float(alone.abs().max()))
