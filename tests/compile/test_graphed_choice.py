"""Tokens chosen inside graphs are those chosen behind them, for all parameters; a checker stands in for the device."""

from dataclasses import replace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from autodeploy.compile.graphed_choice import GraphedChoice, why_not_chosen
from autodeploy.compile.program import Draws, Program
from autodeploy.config import EngineOptions
from autodeploy.ops.sampling import choose_tokens
from autodeploy.runtime.engine import Engine
from autodeploy.runtime.grammar import GrammarCompiler
from autodeploy.runtime.request import SamplingParams, TokenOutput
from autodeploy.runtime.structured_outputs import StructuredOutputsParams
from tests import tiny
from tests.captured import capture_with_checker, facts, program
from tests.runtime.test_async_scheduling import Alternating

DRAWN: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {},
    {"temperature": 0.6, "top_p": 0.95, "top_k": 20},
    {"seed": 5, "top_p": 0.7},
    {"temperature": 0.0, "logprobs": 2},
    {"min_p": 0.1, "n": 2},
    {"temperature": 1.5, "seed": 5, "top_k": 9, "logprobs": 0},
]
SIZES = [1, 3, 5]
LOOKED_AT: list[dict[str, Any]] = [
    {"presence_penalty": 0.7},
    {"logit_bias": {3: 4.0}},
    {"structured_outputs": StructuredOutputsParams(regex=".*")},
]


@pytest.fixture(autouse=True)
def _checker(monkeypatch: pytest.MonkeyPatch) -> None:
    capture_with_checker(monkeypatch)


def served(built: Program, each: list[dict[str, Any]], *, is_asynchronous: bool = False) -> dict[Any, list[Any]]:
    """Tokens and log-probabilities by sequence; requests come one after another and end at different lengths."""
    options = EngineOptions(
        max_num_seqs=5, max_num_batched_tokens=48, page_size=4, seed=11, async_scheduling=is_asynchronous
    )
    engine = Engine(built, options, 96, grammars=cast(GrammarCompiler, _Grammars()))
    prompts = tiny.prompts(len(each), longest=20)
    outputs: list[TokenOutput] = []
    for index, (prompt, given) in enumerate(zip(prompts, each, strict=True)):
        engine.add_request(str(index), prompt, SamplingParams(max_tokens=6 + index, **given))
        outputs += engine.step()
    while engine.has_unfinished_requests():
        outputs += engine.step()
    found: dict[Any, list[Any]] = {}
    for output in outputs:
        found.setdefault((output.request_id, output.index), []).append((output.token_ids, output.logprobs))
    return found


class _Grammars(Alternating):
    """Of the vocabulary of tiny models."""

    def matcher(self, _: StructuredOutputsParams) -> "_Grammars":
        return _Grammars()

    def allowed(self) -> Any:
        return torch.arange(tiny.VOCAB_SIZE).numpy() % 3 != self._last % 3


def tokens_of(found: dict[Any, list[Any]]) -> dict[Any, list[int]]:
    return {key: [token for tokens, _ in parts for token in tokens] for key, parts in found.items()}


@pytest.mark.parametrize(("name", "is_asynchronous"), [("llama", True), ("jamba", False)])
def test_tokens_and_log_probabilities_are_those_chosen_behind_the_step(name: str, is_asynchronous: bool) -> None:
    model = getattr(tiny, name)()
    built = program(model, cudagraph_capture_sizes=SIZES)
    found = served(built, DRAWN, is_asynchronous=is_asynchronous)
    expected = served(program(model, "torch-simple"), DRAWN, is_asynchronous=is_asynchronous)
    assert tokens_of(found) == tokens_of(expected)
    for key, parts in found.items():
        for (_, mine), (_, theirs) in zip(parts, expected[key], strict=True):
            assert [list(entry) for entry in mine or ()] == [list(entry) for entry in theirs or ()]
    counted = facts(built)
    assert counted["choice"] == "in the graph"
    assert counted["chosen"]["in the graph"] == counted["steps"]["whole"] > 5
    assert counted["chosen"].keys() == {"in the graph", "behind the step: it was no whole graph"}
    assert sum(counted["chosen"].values()) == sum(counted["steps"].values())


def test_rows_with_penalties_or_constraints_take_their_steps_out() -> None:
    model = tiny.llama()
    built, plain = program(model, cudagraph_capture_sizes=SIZES), program(model, "torch-simple")
    for given in LOOKED_AT:
        each = [given, {"temperature": 0.0}, {"seed": 4}]
        assert tokens_of(served(built, each)) == tokens_of(served(plain, each))
        chosen = facts(built)["chosen"]
        assert chosen["behind the step: a row has penalties or constraints"] > 2
        assert chosen["in the graph"] > 0  # when that sequence has ended


def test_parameters_are_copied_when_they_are_others_and_nobody_looks_at_padding() -> None:
    rows = 4
    seen: list[dict[str, Tensor]] = []

    def choose(logits: Tensor, *arguments: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(dict(zip(list(choose_tokens.parameters)[1:], (value.clone() for value in arguments), strict=True)))
        found: tuple[Tensor, Tensor] = choose_tokens.reference(logits, *arguments)
        return found

    choice = GraphedChoice(choose, rows, torch.device("cpu"))
    shares = torch.tensor([[0.5, 1.0], [0.9, 1.0], [0.0, 0.1]])
    numbers = torch.tensor([[0, 7], [11, 12]])
    inputs = {"position_ids": torch.tensor([[9, 3, 0]]), "logits_indices": torch.tensor([1, 0, 0])}
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    choice.fill(Draws(torch.ones(3, rows), torch.full((2, rows), 5), True))
    draws = Draws(shares, numbers, True)
    choice.fill(draws)
    choice.choose(logits, inputs)
    assert seen[0]["temperature"].tolist() == [0.5, 1.0, -1.0]
    assert seen[0]["top_p"][:2].tolist() == pytest.approx([0.9, 1.0])
    assert seen[0]["min_p"][:2].tolist() == pytest.approx([0.0, 0.1])
    assert seen[0]["top_k"][:2].tolist() == [0, 7] and seen[0]["keys"][:2].tolist() == [11, 12]
    assert seen[0]["positions"][:2].tolist() == [4, 10]  # of the tokens behind positions 3 and 9
    tokens, best = choice.chosen(2)
    assert torch.equal(best, logits[:2].max(-1).values)
    kept = tokens.tolist()
    choice.fill(replace(draws, numbers=numbers + 100))
    choice.choose(-logits, inputs)
    assert tokens.tolist() == kept and choice.chosen(2)[0].tolist() != kept


def test_nobody_looks_at_rows_of_a_step_that_is_chosen_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    """In trial runs, where kernels are measured, somebody does."""
    temperatures: list[list[float]] = []
    honest = GraphedChoice.fill

    def fill(self: GraphedChoice, draws: Draws | None) -> None:
        temperatures.append(self._shares[0].tolist())
        honest(self, draws)
        temperatures.append(self._shares[0].tolist())

    monkeypatch.setattr(GraphedChoice, "fill", fill)
    built = program(tiny.llama(), cudagraph_capture_sizes=[2])
    served(built, [{"presence_penalty": 0.5}, {"temperature": 0.5}])
    assert temperatures[0] == [0.0, 0.0] and temperatures[1] == [-1.0, -1.0]
    assert temperatures[-1] == [0.5, -1.0], "when the first sequence has ended"


def test_why_graphs_do_not_choose() -> None:
    assert why_not_chosen(None, ["position_ids", "logits_indices"]) == "no kernel chooses tokens on this device"
    assert why_not_chosen(choose_tokens.reference, ["logits_indices"]) == "the graph reads no position_ids"
    assert why_not_chosen(choose_tokens.reference, ["position_ids", "logits_indices"]) is None


def test_a_program_without_a_kernel_chooses_behind_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(choose_tokens.kernels, "cpu", replace(choose_tokens.kernels["cpu"], supports=lambda **_: "no"))
    model = tiny.llama()
    built = program(model, cudagraph_capture_sizes=[1])
    assert not built.chooses_tokens and built.choose_tokens is None
    assert tokens_of(served(built, DRAWN)) == tokens_of(served(program(model, "torch-simple"), DRAWN))
    assert facts(built)["choice"] == "no kernel chooses tokens on this device" and facts(built)["chosen"] == {}
