"""RollLoops: loops over tokens as authors write them give the model's numbers; what cannot be rolled is refused."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from autodeploy.errors import GraphLevelError
from autodeploy.graph.levels import Level
from autodeploy.graph.verify import verify
from autodeploy.ops import recurrence
from autodeploy.transforms.canonicalize.roll_loops import RollLoops
from tests.graphs import LENGTHS, Sketch, captured, run


def _stacked(self: Sketch, x: Tensor) -> Tensor:
    state, rows = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        state = self.decay * state + x[:, t]
        rows.append(state.tanh())
    return torch.stack(rows, dim=1)


def _written_into_rows(self: Sketch, x: Tensor) -> Tensor:
    state, rows = torch.full_like(x[:, 0], 0.5), torch.empty_like(x)
    for t in range(x.size(1)):
        state = torch.maximum(self.decay * state, x[:, t])
        rows[:, t] = state
    return rows


def _matrix_state(self: Sketch, x: Tensor) -> Tensor:
    """Linear attention: heads first, tokens in dimension 2, one-token slices concatenated, a learned start."""
    q, k, v = (x.unflatten(-1, (2, 8)).transpose(1, 2) * s for s in (1.0, 0.5, 2.0))
    state, rows = self.start.expand(x.shape[0], 2, 8, 8), []
    for i in range(q.shape[2]):
        state = 0.9 * state + k[:, :, i : i + 1].transpose(-1, -2) @ v[:, :, i : i + 1]
        rows.append(q[:, :, i : i + 1] @ state)
    return torch.cat(rows, dim=2).transpose(1, 2).flatten(-2)


def _two_outputs_two_states(self: Sketch, x: Tensor) -> Tensor:
    high, low = torch.zeros(x.shape[0], 16), torch.zeros(x.shape[0], 16)
    highs, lows = [], torch.zeros_like(x)
    for t in range(x.shape[1]):
        gate = torch.sigmoid(self.gate(x[:, t]))
        high, low = gate * high + x[:, t], (1 - gate) * low + high
        highs.append(high)
        lows[:, t] = low
    return torch.stack(highs, 1) + lows


def _previous_token(self: Sketch, x: Tensor) -> Tensor:
    before, rows = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        rows.append(x[:, t] + before)
        before = x[:, t]
    return torch.stack(rows, 1)


def _invariants_inside(self: Sketch, x: Tensor) -> Tensor:
    """The whole row is transposed, and constants are made, in every step."""
    state, rows = torch.zeros(1, 16), []
    for t in range(x.shape[1]):
        state = state * torch.ones(16) * 0.5 + x.transpose(0, 1)[t] * self.decay.exp()
        rows.append(state)
    return torch.stack(rows, 1)


def _two_loops(self: Sketch, x: Tensor) -> Tensor:
    return _written_into_rows(self, _stacked(self, x))


ROLLED = [
    _stacked,
    _written_into_rows,
    _matrix_state,
    _two_outputs_two_states,
    _previous_token,
    _invariants_inside,
    _two_loops,
]


def _sketch(body: Callable[..., Tensor]) -> Sketch:
    model = Sketch(
        body,
        decay=nn.Parameter(torch.rand(16)),
        gate=nn.Linear(16, 16),
        start=nn.Parameter(torch.randn(1, 2, 8, 8)),
    )
    return model.eval()


def _alone(model: nn.Module) -> Tensor:
    """The model's own result for each of the sequences that `run` packs."""
    ids = torch.randint(0, 32, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return torch.cat([model(row) for row in ids.split(LENGTHS, dim=1)], dim=1)


@pytest.mark.parametrize("body", ROLLED)
def test_packed_sequences_give_the_models_own_numbers(body: Callable[..., Tensor]) -> None:
    model = _sketch(body)
    graph = captured(model)
    report = RollLoops().run(graph)
    loops = 2 if body is _two_loops else 1
    assert (report.found, report.rewritten, len(graph.nodes(recurrence))) == (loops, loops, loops), report.refused
    verify(graph, Level.CANONICAL)
    torch.testing.assert_close(run(graph, model), _alone(model), rtol=1e-5, atol=1e-5)


def _looks_further_back(self: Sketch, x: Tensor) -> Tensor:
    one, two, rows = torch.zeros_like(x[:, 0]), torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        rows.append(two)
        one, two = x[:, t], one
    return torch.stack(rows, 1)


def _starts_from_a_token(self: Sketch, x: Tensor) -> Tensor:
    state, rows = x[:, 0], []
    for t in range(x.shape[1]):
        state = 0.5 * state + x[:, t]
        rows.append(state)
    return torch.stack(rows, 1)


def _last_state_is_used(self: Sketch, x: Tensor) -> Tensor:
    state, rows = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        state = 0.5 * state + x[:, t]
        rows.append(state)
    return torch.stack(rows, 1) + state[:, None]


def _reads_the_next_token(self: Sketch, x: Tensor) -> Tensor:
    state, rows = torch.zeros_like(x[:, 0]), []
    padded = torch.nn.functional.pad(x, (0, 0, 0, 1))
    for t in range(x.shape[1]):
        state = 0.5 * state + padded[:, t + 1]
        rows.append(state)
    return torch.stack(rows, 1)


def _reads_the_whole_row(self: Sketch, x: Tensor) -> Tensor:
    state, rows = torch.zeros_like(x[:, 0]), []
    for t in range(x.shape[1]):
        state = torch.softmax(x @ state[0], dim=1) @ x[0] + x[:, t]
        rows.append(state)
    return torch.stack(rows, 1)


def _powers_of_the_counter(self: Sketch, x: Tensor) -> Tensor:
    rows = []
    for t in range(x.shape[1]):
        rows.append(x[:, t] * 0.5 ** t.__index__())
    return torch.stack(rows, 1)


def _first_step_differs(self: Sketch, x: Tensor) -> Tensor:
    state, rows = None, []
    for t in range(x.shape[1]):
        state = x[:, t] if state is None else self.decay * state + x[:, t]
        rows.append(state)
    return torch.stack(rows, 1)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (_looks_further_back, "looks further back than one step"),
        (_starts_from_a_token, "starts from a value of the row's own tokens"),
        (_last_state_is_used, "is read after it has ended"),
        (_reads_the_next_token, "first step than in its second|another value"),
        (_reads_the_whole_row, "reads the whole row"),
        (_powers_of_the_counter, "uses another value"),
        (_first_step_differs, "does other things in its first step"),
    ],
)
def test_what_cannot_be_rolled_is_refused_with_its_line(body: Callable[..., Tensor], reason: str) -> None:
    graph = captured(_sketch(body))
    (refusal,) = RollLoops().run(graph).refused
    assert re.search(rf'the loop over tokens at File ".*line \d+.*({reason}).*docs/adding-an-op.md', refusal), refusal
    with pytest.raises(GraphLevelError, match="loop over tokens"):
        verify(graph, Level.CANONICAL)
