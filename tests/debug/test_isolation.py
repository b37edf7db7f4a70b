"""The batch-isolation check finds what mixes tokens unseen, names it, and says when it could prove nothing."""

import pytest
import torch
from torch import Tensor, nn

from autodeploy.build import build
from autodeploy.config import parse_options
from autodeploy.errors import TokenMixingError
from tests.graphs import Sketch, attention_model, causal_sdpa


def test_passes_for_attention() -> None:
    assert build(attention_model(causal_sdpa)).report.facts["isolation"] == "passed"


def test_is_inconclusive_when_nothing_mixes() -> None:
    report = build(Sketch(lambda self, x: x.relu())).report
    assert report.facts["isolation"].startswith("inconclusive")


def _mean_over_tokens(self: nn.Module, x: Tensor) -> Tensor:
    return self.inner(x + x.mean(1, keepdim=True))


@pytest.mark.parametrize("quantization", [None, "int8"])
def test_a_mixing_op_is_named_with_its_line(quantization: str | None) -> None:
    model = Sketch(_mean_over_tokens, inner=nn.Linear(16, 16))
    with pytest.raises(TokenMixingError, match=r"First seen at add in module"):
        build(model, parse_options({"quantization": quantization}))


def test_can_be_switched_off() -> None:
    model = Sketch(_mean_over_tokens, inner=nn.Linear(16, 16))
    assert "isolation" not in build(model, parse_options({"check_isolation": False})).report.facts


def test_positions_from_the_rows_start_would_be_found() -> None:
    def body(self: nn.Module, x: Tensor) -> Tensor:
        return x + self.table(torch.arange(x.shape[1], device=x.device))

    model = Sketch(body, table=nn.Embedding(64, 16))
    assert build(model).report.facts["isolation"] != "failed"
    off = parse_options({"transforms": {"use_position_ids": {"enabled": False}}})
    with pytest.raises(TokenMixingError, match="packed into one batch"):
        build(model, off)


def test_a_tie_that_rounding_breaks_once_is_no_mixing(monkeypatch: pytest.MonkeyPatch) -> None:
    seeds: list[int] = []

    def once(program: object, graph: object, seed: int) -> str:
        seeds.append(seed)
        if seed == 0:
            raise TokenMixingError("one token")
        return "passed"

    monkeypatch.setattr("autodeploy.debug.isolation._check_once", once)
    assert build(attention_model(causal_sdpa)).report.facts["isolation"] == "passed"
    assert seeds == [0, 1]
