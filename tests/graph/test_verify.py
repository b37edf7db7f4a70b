"""Graph levels as checks: each refuses what it must, naming module and source line."""

import pytest
import torch
from torch import Tensor, nn

from autodeploy.errors import GraphLevelError
from autodeploy.graph.levels import Level
from autodeploy.graph.verify import verify
from tests.graphs import Sketch, attention_model, captured, causal_sdpa


def test_levels_are_reached_in_order() -> None:
    graph = captured(attention_model(causal_sdpa))
    verify(graph, Level.CAPTURED)
    with pytest.raises(GraphLevelError, match=r"not CANONICAL.*scaled_dot_product_attention.*module layer"):
        verify(graph, Level.CANONICAL)
    assert graph.level is Level.CAPTURED


def test_token_wise_model_is_canonical_as_it_is() -> None:
    verify(captured(Sketch(lambda self, x: x.relu())), Level.CANONICAL)


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (lambda self, x: x.cumsum(1), "cumsum"),
        (lambda self, x: x.roll(1, 1), "roll"),
        (lambda self, x: self.conv(x.transpose(1, 2)).transpose(1, 2), "conv1d"),
        (lambda self, x: (x @ x.transpose(1, 2)).softmax(-1) @ x, "token-by-token matrix"),
    ],
)
def test_mixing_that_no_transform_knows_is_named(body, what: str) -> None:  # type: ignore[no-untyped-def]
    graph = captured(Sketch(body, conv=nn.Conv1d(16, 16, 3, padding=1)))
    with pytest.raises(GraphLevelError, match=what):
        verify(graph, Level.CANONICAL)


def _attends_within_a_token(self: nn.Module, x: Tensor) -> Tensor:
    parts = x.view(*x.shape[:2], 4, 4)
    return torch.nn.functional.scaled_dot_product_attention(parts, parts, parts).flatten(2)


@pytest.mark.parametrize("body", [lambda self, x: x.cumsum(2), lambda self, x: x.flip(-1), _attends_within_a_token])
def test_near_miss_the_same_ops_along_features(body) -> None:  # type: ignore[no-untyped-def]
    verify(captured(Sketch(body)), Level.CANONICAL)


def test_a_fixed_length_is_refused() -> None:
    def body(self: nn.Module, x: Tensor) -> Tensor:
        return x if int(x.shape[1]) == 23 else x + 1

    with pytest.raises(GraphLevelError, match="exactly 23 tokens"):
        verify(captured(Sketch(body)), Level.CANONICAL)


def test_a_stateless_mixer_is_not_cached() -> None:
    from autodeploy.transforms.pipeline import default_pipeline

    graph = captured(attention_model(causal_sdpa))
    list(default_pipeline(torch.device("cpu")).stages[0].run(graph))
    with pytest.raises(GraphLevelError, match="attention has no cache"):
        verify(graph, Level.CACHED)
