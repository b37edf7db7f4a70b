"""MatchTokenWindow: windows of earlier tokens of each sequence, and near misses that look elsewhere."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from autodeploy.errors import GraphLevelError
from autodeploy.graph.levels import Level
from autodeploy.graph.verify import verify
from autodeploy.transforms.canonicalize.bind_boundaries import BindBoundaries
from autodeploy.transforms.canonicalize.match_token_window import MatchTokenWindow
from tests.graphs import LENGTHS, Sketch, captured, counts, run

WINDOWS: dict[str, Callable[[Sketch, Tensor], Tensor]] = {
    "tokens_second": lambda self, x: (F.pad(x, (0, 0, 2, 0)).unfold(1, 3, 1) * self.taps[:3]).sum(-1),
    "tokens_last": lambda self, x: (
        F.pad(x.transpose(1, 2), (3, 0))[..., -(x.shape[1] + 3) :].unfold(-1, 4, 1).flip(-1).transpose(1, 2) * self.taps
    ).sum(-1),
}
NEAR_MISSES: dict[str, Callable[[Sketch, Tensor], Tensor]] = {
    "looks_ahead": lambda self, x: (F.pad(x, (0, 0, 1, 1)).unfold(1, 3, 1) * self.taps[:3]).sum(-1),
    "pads_with_ones": lambda self, x: (F.pad(x, (0, 0, 2, 0), value=1.0).unfold(1, 3, 1) * self.taps[:3]).sum(-1),
}


def _model(body: Callable[[Sketch, Tensor], Tensor]) -> Sketch:
    model = Sketch(body)
    model.register_buffer("taps", torch.tensor([0.5, -1.0, 2.0, 0.25]))
    return model


@pytest.mark.parametrize("body", WINDOWS.values(), ids=WINDOWS)
def test_fires_and_keeps_the_numbers_of_each_sequence(body: Callable[[Sketch, Tensor], Tensor]) -> None:
    model = _model(body)
    graph = captured(model)
    report = MatchTokenWindow().run(graph)
    BindBoundaries().run(graph)
    assert report.rewritten == 1 and counts(graph)["token_shift"] in (2, 3)
    verify(graph, Level.CANONICAL)
    ids = torch.randint(0, 32, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(0))
    expected = torch.cat([model(row) for row in ids.split(LENGTHS, dim=1)], dim=1)
    torch.testing.assert_close(run(graph, model), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("body", NEAR_MISSES.values(), ids=NEAR_MISSES)
def test_near_misses_are_left_alone_and_refused(body: Callable[[Sketch, Tensor], Tensor]) -> None:
    graph = captured(_model(body))
    assert MatchTokenWindow().run(graph).found == 0
    with pytest.raises(GraphLevelError, match="unfold"):
        verify(graph, Level.CANONICAL)


def test_windows_along_channels_are_token_wise() -> None:
    graph = captured(_model(lambda self, x: (F.pad(x, (2, 0)).unfold(-1, 3, 1) * self.taps[:3]).sum(-1)))
    assert MatchTokenWindow().run(graph).found == 0
    verify(graph, Level.CANONICAL)
