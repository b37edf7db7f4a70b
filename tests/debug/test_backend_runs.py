"""What backends give while they generate, and whether graphs choose what their logits give; a checker is the device."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

from autodeploy.compile.cuda_graph import GraphedFunction
from autodeploy.compile.graphed_choice import GraphedChoice
from autodeploy.compile.program import Draws
from autodeploy.config import parse_options
from autodeploy.debug.backend_runs import NUM_TOKENS, BackendRun, run_backend
from autodeploy.debug.shrink import tiny_model
from autodeploy.ops.sampling import choose_tokens
from tests import tiny
from tests.captured import capture_with_checker

SIMPLE, GRAPHS = "torch-simple", "torch-cudagraph"
VOCAB_SIZE = 64
ROWS = [torch.tensor(row) % VOCAB_SIZE for row in tiny.prompts(3, longest=9)]
NUM_ALL, NUM_INSIDE = NUM_TOKENS * len(ROWS), (NUM_TOKENS - 1) * len(ROWS)
"""tokens of a run, and those that graphs choose: prompts run in pieces"""


@pytest.fixture(autouse=True)
def _checker(monkeypatch: pytest.MonkeyPatch) -> None:
    capture_with_checker(monkeypatch)


def run(backend: str, shown: Tensor | None = None) -> BackendRun:
    sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    model = tiny_model(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    return run_backend(model, parse_options({"device": "cpu"}).compile, backend, ROWS, shown)


def test_rows_draw_in_every_way_and_graphs_choose_what_is_chosen_behind_them() -> None:
    first = run(SIMPLE)
    graphs = run(GRAPHS, first.token_ids)
    assert len(first.token_ids) == NUM_ALL and not first.in_graph.any() and first.choice is None
    best = first.logits.argmax(-1)
    assert 0 < (first.token_ids == best).sum() < NUM_ALL, "some are drawn"
    assert torch.equal(graphs.token_ids, first.token_ids)
    torch.testing.assert_close(graphs.logits, first.logits, rtol=1e-5, atol=1e-5)
    assert int(graphs.in_graph.sum()) == int(graphs.in_graph_agrees.sum()) == NUM_INSIDE
    assert not (graphs.chooses_otherwise or graphs.is_partly_unseen or first.is_partly_unseen)
    assert first.described(first) == f"{NUM_ALL} of {NUM_ALL} tokens are those of the first backend"
    assert graphs.described(first).endswith(
        f"; {NUM_INSIDE} of {NUM_INSIDE} tokens chosen in graphs are what their logits give"
    )


def _later_positions(choose: Any) -> Any:
    def wrong(self: GraphedChoice, logits: Tensor, inputs: Mapping[str, Tensor]) -> None:
        choose(self, logits, {**inputs, "position_ids": inputs["position_ids"] + 1})

    return wrong


def _only_the_first(fill: Any) -> Any:
    seen: list[Draws | None] = []

    def wrong(self: GraphedChoice, draws: Draws | None) -> None:
        seen.append(draws)
        fill(self, seen[0])

    return wrong


def _no_best(choose: Any) -> Any:
    def wrong(self: GraphedChoice, logits: Tensor, inputs: Mapping[str, Tensor]) -> None:
        choose(self, logits, inputs)
        self._best.zero_()

    return wrong


@pytest.mark.parametrize(
    ("name", "damage"), [("choose", _later_positions), ("fill", _only_the_first), ("choose", _no_best)]
)
def test_what_graphs_choose_otherwise_is_seen(name: str, damage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GraphedChoice, name, damage(getattr(GraphedChoice, name)))
    graphs = run(GRAPHS)
    agreeing = int(graphs.in_graph_agrees.sum())
    assert graphs.chooses_otherwise and agreeing < NUM_INSIDE
    assert f"{agreeing} of {NUM_INSIDE} tokens chosen in graphs are what their logits give" in graphs.described(graphs)


def test_where_no_graph_chooses_that_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(GraphedFunction, "_decodes", lambda *_: False)
        graphs = run(GRAPHS)
    assert graphs.is_partly_unseen and not graphs.chooses_otherwise
    assert graphs.described(graphs).endswith("; no token was chosen in a graph")
    monkeypatch.setitem(choose_tokens.kernels, "cpu", replace(choose_tokens.kernels["cpu"], supports=lambda **_: "no"))
    graphs = run(GRAPHS)
    assert not (graphs.is_partly_unseen or graphs.chooses_otherwise)
    assert graphs.described(graphs).endswith(
        "; no token was chosen in a graph: no kernel chooses tokens on this device"
    )


def test_what_is_shown_is_what_goes_on() -> None:
    """Logits follow the tokens that another run chose, whatever this one would have."""
    own = run(SIMPLE)
    other = run(SIMPLE, (own.token_ids + 1) % VOCAB_SIZE)
    prompts = slice(0, len(ROWS))
    torch.testing.assert_close(other.logits[prompts], own.logits[prompts])
    assert not torch.allclose(other.logits[len(ROWS) :], own.logits[len(ROWS) :])
