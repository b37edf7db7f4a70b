"""MatchCausalConv: convolutions that look back, as modules and functions, grouped, dilated and chained; near misses."""

from collections import Counter
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autodeploy.errors import GraphLevelError
from autodeploy.graph.levels import Level
from autodeploy.graph.verify import verify
from autodeploy.transforms.canonicalize.bind_boundaries import BindBoundaries
from autodeploy.transforms.canonicalize.match_causal_conv import MatchCausalConv
from tests.graphs import LENGTHS, Sketch, captured, counts, run

Body = Callable[[Sketch, Tensor], Tensor]


def _along(convolve: Callable[[Sketch, Tensor], Tensor]) -> Body:
    return lambda self, x: convolve(self, x.transpose(1, 2)).transpose(1, 2)


CONVOLUTIONS: dict[str, tuple[Body, dict[str, int]]] = {
    "depthwise_module_cut_to_length": (_along(lambda s, x: s.depthwise(x)[..., : x.shape[-1]]), {"causal_conv": 1}),
    "depthwise_module_cut_from_the_end": (_along(lambda s, x: s.depthwise(x)[..., :-3]), {"causal_conv": 1}),
    "padded_before": (
        _along(lambda s, x: F.conv1d(F.pad(x, (3, 0)), s.depthwise.weight, groups=16)),
        {"causal_conv": 1},
    ),
    "grouped": (_along(lambda s, x: s.grouped(F.pad(x, (2, 0)))), {"token_shift": 2}),
    "dense_to_more_channels": (_along(lambda s, x: s.dense(F.pad(x, (1, 0)))[:, :16]), {"token_shift": 1}),
    "dilated": (_along(lambda s, x: s.dilated(F.pad(x, (4, 0)))), {"token_shift": 2}),
    "chained_on_one_padding": (
        _along(lambda s, x: s.grouped(s.plain(F.pad(x, (5, 0))))),
        {"causal_conv": 1, "token_shift": 2},
    ),
    "one_tap": (_along(lambda s, x: s.pointwise(x)), {}),
}
NEAR_MISSES: dict[str, Body] = {
    "centred": _along(lambda s, x: F.conv1d(F.pad(x, (1, 1)), s.grouped.weight, groups=4)),
    "looks_ahead": _along(lambda s, x: s.grouped(F.pad(x, (0, 2)))),
    "cut_from_the_start": _along(lambda s, x: s.depthwise(x)[..., 3:]),
    "padded_with_ones": _along(lambda s, x: s.grouped(F.pad(x, (2, 0), value=1.0))),
    "reflected": _along(lambda s, x: s.grouped(F.pad(x, (2, 0), mode="replicate"))),
    "three_on_one_padding": _along(lambda s, x: s.grouped(s.grouped(s.plain(F.pad(x, (7, 0)))))),
    "two_at_a_time": _along(lambda s, x: F.conv1d(F.pad(x, (3, 0)), s.grouped.weight, groups=4, stride=2)),
}


def _sketch(body: Body) -> Sketch:
    model = Sketch(
        body,
        depthwise=nn.Conv1d(16, 16, 4, groups=16, padding=3),
        plain=nn.Conv1d(16, 16, 4, groups=16),
        grouped=nn.Conv1d(16, 16, 3, groups=4),
        dense=nn.Conv1d(16, 24, 2),
        dilated=nn.Conv1d(16, 16, 3, groups=4, dilation=2),
        pointwise=nn.Conv1d(16, 16, 1),
    )
    return model.eval()


@pytest.mark.parametrize(("body", "ops"), CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_fires_and_keeps_the_numbers_of_each_sequence(body: Body, ops: dict[str, int]) -> None:
    model = _sketch(body)
    graph = captured(model)
    report = MatchCausalConv().run(graph)
    BindBoundaries().run(graph)
    assert report.refused == () and report.rewritten == report.expected and counts(graph) == Counter(ops)
    verify(graph, Level.CANONICAL)
    ids = torch.randint(0, 32, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(0))
    expected = torch.cat([model(row) for row in ids.split(LENGTHS, dim=1)], dim=1)
    torch.testing.assert_close(run(graph, model), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("body", NEAR_MISSES.values(), ids=NEAR_MISSES)
def test_refuses_what_does_not_only_look_back(body: Body) -> None:
    graph = captured(_sketch(body))
    MatchCausalConv().run(graph)
    BindBoundaries().run(graph)
    with pytest.raises(GraphLevelError, match=r"mixes tokens|logits for"):
        verify(graph, Level.CANONICAL)
