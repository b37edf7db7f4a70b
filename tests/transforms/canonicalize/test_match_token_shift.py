"""MatchTokenShift: every way to look at the token before, and near misses that look elsewhere."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autodeploy.transforms.canonicalize.bind_boundaries import BindBoundaries
from autodeploy.transforms.canonicalize.match_token_shift import MatchTokenShift
from tests.graphs import LENGTHS, Sketch, captured, counts, run

SHIFTS: dict[str, Callable[[Sketch, Tensor], Tensor]] = {
    "pad_and_cut": lambda self, x: F.pad(x, (0, 0, 1, -1)),
    "zero_pad_module": lambda self, x: nn.ZeroPad2d((0, 0, 1, -1))(x),
    "cut_then_pad": lambda self, x: F.pad(x[:, :-2], (0, 0, 2, 0)),
    "joined": lambda self, x: torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], dim=1),
    "joined_further": lambda self, x: torch.cat([x.new_zeros(1, 3, 16), x[:, :-3]], dim=1),
    "after_a_weight": lambda self, x: torch.cat([self.start(x.new_zeros(1, 1, 16)), self.start(x)[:, :-1]], dim=1),
    "channels_first": lambda self, x: F.pad(x.transpose(1, 2), (1, -1)).transpose(1, 2),
}
NEAR_MISSES: dict[str, Callable[[Sketch, Tensor], Tensor]] = {
    "looks_ahead": lambda self, x: F.pad(x, (0, 0, -1, 1)),
    "pads_with_ones": lambda self, x: F.pad(x, (0, 0, 1, -1), value=1.0),
    "along_channels": lambda self, x: F.pad(x, (1, -1)),
    "starts_with_a_token": lambda self, x: torch.cat([x[:, :1], x[:, :-1]], dim=1),
    "only_pads": lambda self, x: F.pad(x, (0, 0, 1, 0))[:, 1:],
}


@pytest.mark.parametrize("body", SHIFTS.values(), ids=SHIFTS)
def test_fires_and_keeps_the_numbers_of_each_sequence(body: Callable[..., Tensor]) -> None:
    model = Sketch(body, start=nn.Linear(16, 16)).eval()
    graph = captured(model)
    report = MatchTokenShift().run(graph)
    BindBoundaries().run(graph)
    assert report.rewritten == counts(graph)["token_shift"] == 1
    ids = torch.randint(0, 32, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(0))
    expected = torch.cat([model(row) for row in ids.split(LENGTHS, dim=1)], dim=1)
    torch.testing.assert_close(run(graph, model), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("body", NEAR_MISSES.values(), ids=NEAR_MISSES)
def test_leaves_near_misses_alone(body: Callable[..., Tensor]) -> None:
    assert MatchTokenShift().run(captured(Sketch(body))).found == 0
