"""Drafts change how many tokens a step yields, never which: greedy, sampled, penalised, ended in the middle."""

import re
from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor

from autodeploy.compile.program import ChooseTokens
from autodeploy.config import EngineOptions
from autodeploy.ops.sampling import choose_tokens
from autodeploy.runtime.engine import Engine
from autodeploy.runtime.request import SamplingParams, TokenOutput
from autodeploy.runtime.structured_outputs import StructuredOutputsParams
from tests.runtime.toy import VOCAB, logits_of, reference_logits, reference_tokens, toy_program
from tests.server.running import TOKENIZER, random_engine

LAYERS = ("full", "window")
DRAFT_MODEL = {"model": "the same layers, with errors", "num_speculative_tokens": 4}
HEAD = {"method": "eagle", "model": "a head of the program, with errors", "num_speculative_tokens": 4}
HIGHEST_CHI_SQUARE = 54.0  # 22 degrees of freedom: one sample in 5000 lies above


def make_engine(
    layers: tuple[str, ...] = LAYERS,
    *,
    drafts: dict[str, Any] | None = DRAFT_MODEL,
    choose: ChooseTokens | None = None,
    **program: Any,
) -> Engine:
    options = EngineOptions(page_size=4, max_num_seqs=130, seed=3, speculative_config=drafts)
    draft = toy_program(layers, err_every=3)
    return Engine(replace(toy_program(layers, **program), choose_tokens=choose), options, 64, draft=draft)


def run(engine: Engine, prompt: list[int], params: SamplingParams) -> list[TokenOutput]:
    engine.add_request("a", prompt, params)
    outputs = []
    while engine.has_unfinished_requests():
        outputs += engine.step()
    return outputs


def tokens_of(outputs: list[TokenOutput]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0, max_tokens=30),
        SamplingParams(temperature=0, max_tokens=30, repetition_penalty=1.3, frequency_penalty=0.2),
        SamplingParams(temperature=0, max_tokens=30, logprobs=2),
        SamplingParams(temperature=0.03, max_tokens=30, seed=5),
        SamplingParams(temperature=0.1, max_tokens=30, seed=6, top_p=0.8, presence_penalty=0.1, logprobs=1),
        SamplingParams(temperature=0, max_tokens=30, bad_token_sequences=[[3], [1, 2]], logit_bias={4: 0.3}),
    ],
    ids=str,
)
def test_the_tokens_are_those_without_drafts(params: SamplingParams) -> None:
    plain, drafting = make_engine(drafts=None), make_engine()
    expected, outputs = run(plain, [1, 2, 3], params), run(drafting, [1, 2, 3], params)
    assert tokens_of(outputs) == tokens_of(expected)
    assert len(outputs) < len(expected), "no step yielded more than one token"
    if params.logprobs is not None:
        entries = [[entry for output in each for entry in output.logprobs or ()] for each in (outputs, expected)]
        assert entries[0] == entries[1] and len(entries[0]) == 30
    stats = drafting.stats()
    assert 0 < stats.accepted_tokens < stats.draft_tokens
    assert stats.acceptance_length == 1 + stats.accepted_tokens / stats.num_drafts
    assert stats.generation_tokens == 30 and plain.stats().acceptance_length == 1


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0, max_tokens=30, logprobs=2),
        SamplingParams(temperature=0.03, max_tokens=30, seed=5),
        SamplingParams(temperature=0.1, max_tokens=30, seed=6, top_p=0.8, logprobs=1),
        SamplingParams(temperature=0.1, max_tokens=30, seed=6, presence_penalty=0.1),
    ],
    ids=str,
)
def test_rows_are_chosen_from_at_once_where_a_row_needs_no_token_before(params: SamplingParams) -> None:
    """As on a device: one choice a step, and the same tokens; with penalties, a choice for each token."""
    num_choices = 0

    def choose(*arguments: Any) -> tuple[Tensor, Tensor]:
        nonlocal num_choices
        num_choices += 1
        chosen: tuple[Tensor, Tensor] = choose_tokens.reference(*arguments)
        return chosen

    drafting = make_engine(choose=choose)
    expected, outputs = run(make_engine(drafts=None), [1, 2, 3], params), run(drafting, [1, 2, 3], params)
    assert tokens_of(outputs) == tokens_of(expected) and len(outputs) < len(expected)
    entries = [[entry for output in each for entry in output.logprobs or ()] for each in (outputs, expected)]
    assert [list(entry) for entry in entries[0]] == [list(entry) for entry in entries[1]]
    assert 0 < drafting.stats().accepted_tokens < drafting.stats().draft_tokens
    num_steps = drafting.stats().num_steps
    assert num_choices > num_steps if params.has_penalties else num_choices == num_steps


@pytest.mark.parametrize("end", ["stop", "error"])
def test_rows_behind_an_end_are_left_out_though_they_were_chosen_from(end: str) -> None:
    free = reference_tokens(LAYERS, [1, 2], 30)
    at = next(at for at in range(6, 30) if free[at] not in (1, 2, *free[:at]))
    given: dict[str, Any] = {"eos_token_ids": (free[at],)} if end == "stop" else {"poison": free[at]}
    engine = make_engine(choose=choose_tokens.reference, **given)
    outputs = run(engine, [1, 2], SamplingParams(temperature=0, max_tokens=30))
    assert tokens_of(outputs) == free[: at + 1] and outputs[-1].finish_reason == end


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {"temperature": 1.0, "seed": 4}, {"logprobs": 1, "seed": 5}])
def test_a_grammar_is_followed_through_drafts(params: dict[str, Any]) -> None:
    """Lookup drafts what repeats, and the grammar rules out what it must: with and without drafts the same tokens."""
    guided = StructuredOutputsParams(regex="(ab|cd|ef){12,20}!")
    chosen = SamplingParams(max_tokens=60, structured_outputs=guided, **params)
    plain, drafting = random_engine(), random_engine(speculative_config={"prompt_lookup_min": 1})
    expected, outputs = run(plain, [5, 6], chosen), run(drafting, [5, 6], chosen)
    assert tokens_of(outputs) == tokens_of(expected) and outputs[-1].finish_reason == "stop"
    text = TOKENIZER.decode(tokens_of(outputs))
    assert re.fullmatch("(ab|cd|ef){12,20}!", text), text
    assert drafting.stats().accepted_tokens > 0


def test_a_sequence_ends_at_its_stop_token_and_at_its_length_whatever_is_drafted_behind() -> None:
    free = reference_tokens(LAYERS, [1, 2], 30)
    for at in range(5, 12):
        if free.index(free[at]) == at:
            outputs = run(make_engine(eos_token_ids=(free[at],)), [1, 2], SamplingParams(temperature=0, max_tokens=30))
            assert tokens_of(outputs) == free[: at + 1] and outputs[-1].finish_reason == "stop"
    for length in range(1, 9):
        outputs = run(make_engine(), [1, 2], SamplingParams(temperature=0, max_tokens=length))
        assert tokens_of(outputs) == free[:length] and outputs[-1].finish_reason == "length"


def test_unusable_logits_behind_a_draft_end_the_sequence_after_the_tokens_before() -> None:
    free = reference_tokens(LAYERS, [1, 2], 30)
    at = next(at for at in range(6, 30) if free[at] not in (1, 2, *free[:at]))
    outputs = run(make_engine(poison=free[at]), [1, 2], SamplingParams(temperature=0, max_tokens=30))
    assert tokens_of(outputs) == free[: at + 1] and outputs[-1].finish_reason == "error"


def test_speculating_and_other_sequences_share_a_step() -> None:
    engine = make_engine(("full", "slot"))
    prompts = {"a": [1, 2, 3], "b": [4] * 20, "c": [5, 6]}
    params = SamplingParams(temperature=0, max_tokens=20)
    for name, prompt in prompts.items():
        engine.add_request(name, prompt, replace(params, seed=1) if name == "c" else params)
    got: dict[str, list[int]] = {name: [] for name in prompts}
    while engine.has_unfinished_requests():
        for output in engine.step():
            got[output.request_id] += output.token_ids
    assert got == {name: reference_tokens(("full", "slot"), prompt, 20) for name, prompt in prompts.items()}
    assert engine.stats().accepted_tokens > 10 and engine.stats().state_usage_fraction == 0


@pytest.mark.parametrize(
    ("layers", "drafts", "program"),
    [(LAYERS, DRAFT_MODEL, {}), (("full",), HEAD, {"head_errs_every": 3})],
    ids=["draft model", "head"],
)
def test_the_sampled_distribution_is_the_models(
    layers: tuple[str, ...], drafts: dict[str, Any], program: dict[str, Any]
) -> None:
    """The third token, behind two that were drafted or not, is distributed as the sum over all paths says."""
    temperature, prompt, repeats = 0.15, [1, 2, 3], 12
    expected = [0.0] * VOCAB
    for first, weight in enumerate(_softmax(reference_logits(layers, prompt), temperature)):
        for second, share in enumerate(_softmax(reference_logits(layers, [*prompt, first]), temperature)):
            third = _softmax(reference_logits(layers, [*prompt, first, second]), temperature)
            for token, chance in enumerate(third):
                expected[token] += weight * share * chance
    engine = make_engine(layers, drafts=drafts, **program)
    counts = [0] * VOCAB
    for _ in range(repeats):
        tokens: dict[int, list[int]] = {}
        engine.add_request("a", prompt, SamplingParams(temperature=temperature, max_tokens=5, n=128))
        while engine.has_unfinished_requests():
            for output in engine.step():
                tokens.setdefault(output.index, []).extend(output.token_ids)
        for drawn in tokens.values():
            counts[drawn[2]] += 1
    total = 128 * repeats
    assert sum(counts) == total and engine.stats().accepted_tokens > 200
    chi_square = sum((count - total * p) ** 2 / (total * p) for count, p in zip(counts, expected, strict=True))
    assert min(expected) * total > 4 and chi_square < HIGHEST_CHI_SQUARE
    uniform = sum((count - total / VOCAB) ** 2 / (total / VOCAB) for count in counts)
    assert uniform > HIGHEST_CHI_SQUARE, "the test would not see another distribution"


def _softmax(logits: list[float], temperature: float) -> list[float]:
    weights = [2.718281828459045 ** (logit / temperature) for logit in logits]
    return [weight / sum(weights) for weight in weights]


def test_the_reference_has_room_for_other_tokens() -> None:
    """What the distributions are made from: logits that differ by context."""
    assert logits_of(12345) != logits_of(12346) and len(reference_logits(LAYERS, [1])) == VOCAB
