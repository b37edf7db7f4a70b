"""Biases that depend on the tokens: by key, or by a table of distances per query; what is neither is refused."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autodeploy.ops import attention
from autodeploy.transforms.canonicalize.match_attention import MatchAttention
from autodeploy.transforms.canonicalize.use_position_ids import UsePositionIds
from tests.graphs import Attention, Sketch, captured, run

Bias = Callable[["Biased", Tensor, Tensor], Tensor]
"""`bias(layer, x [1, T, 16], distance [T, T])` -> `[1, heads, T, T]`"""


class Biased(Attention):
    """Attention with a bias computed from the hidden states."""

    def __init__(self, bias: Bias):
        super().__init__(lambda q, k, v: q)
        self.bias = bias
        self.by_key = nn.Linear(16, 4)
        self.by_distance = nn.Linear(16, 4 * 3)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, _ = x.shape
        q, k, v = (layer(x).view(batch, tokens, 4, 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
        positions = torch.arange(tokens)
        distance = positions[:, None] - positions
        bias = self.bias(self, x, distance).masked_fill(distance < 0, torch.finfo(x.dtype).min)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return x + self.o(out.transpose(1, 2).reshape(batch, tokens, -1))


def _model(bias: Bias) -> nn.Module:
    torch.manual_seed(0)
    return Sketch(lambda self, x: self.layer(x), layer=Biased(bias)).eval()


def by_key(layer: Biased, x: Tensor, distance: Tensor) -> Tensor:
    return F.softplus(layer.by_key(x)).transpose(1, 2)[:, :, None].expand(-1, -1, x.shape[1], -1)


def by_distance(layer: Biased, x: Tensor, distance: Tensor) -> Tensor:
    logits = layer.by_distance(x).view(1, -1, 4, 3).transpose(1, 2)
    read = logits.gather(-1, distance.clamp(0, 2).expand(1, 4, -1, -1))
    read = read * (1 + 0.1 * torch.arange(x.shape[1])).view(1, 1, -1, 1)
    return read.masked_fill((distance < 0) | (distance >= 3), 0.0)


def by_long_distance(layer: Biased, x: Tensor, distance: Tensor) -> Tensor:
    """A table longer than the lengths that are tried first."""
    logits = torch.cat((layer.by_key(x), layer.by_key(x).tanh().repeat(1, 1, 79)), -1)
    read = logits.view(1, -1, 4, 80).transpose(1, 2).gather(-1, distance.clamp(0, 79).expand(1, 4, -1, -1))
    return read.masked_fill((distance < 0) | (distance >= 80), 0.0)


def by_query_and_key(layer: Biased, x: Tensor, distance: Tensor) -> Tensor:
    rows = layer.by_key(x).transpose(1, 2)
    return rows[:, :, None] * rows[..., None]


def by_distance_to_the_end(layer: Biased, x: Tensor, distance: Tensor) -> Tensor:
    return layer.by_key(x).transpose(1, 2)[..., None] * (x.shape[1] - torch.arange(x.shape[1]))


def by_far_distance(layer: Biased, x: Tensor, distance: Tensor) -> Tensor:
    return layer.by_key(x).transpose(1, 2)[..., None] * distance


@pytest.mark.parametrize("bias", [by_key, by_distance, by_long_distance])
def test_becomes_rows_with_the_same_numbers_packed_or_not(bias: Bias) -> None:
    model = _model(bias)
    graph = captured(model)
    report = MatchAttention().run(graph)
    assert (report.found, report.rewritten, report.refused) == (1, 1, ())
    UsePositionIds().run(graph)
    (node,) = graph.nodes(attention)
    arguments = attention.arguments(node.args, node.kwargs)
    assert arguments["causal"] is True and (arguments["distance_logits"] is not None) == (bias is not by_key)
    result = run(graph, model, [4, 5])
    with torch.no_grad():
        ids = torch.randint(0, 32, (1, 9), generator=torch.Generator().manual_seed(0))
        alone = torch.cat([model(ids[:, :4]), model(ids[:, 4:])], dim=1)
    torch.testing.assert_close(result, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [by_query_and_key, by_distance_to_the_end, by_far_distance])
def test_near_misses_are_refused_with_the_reason(bias: Bias) -> None:
    report = MatchAttention().run(captured(_model(bias)))
    assert (report.found, report.rewritten) == (1, 0)
    assert "position bias" in report.refused[0]
