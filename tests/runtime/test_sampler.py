"""Sampled distributions against probabilities computed in NumPy; penalties and filters against transformers' own."""

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch._subclasses import FakeTensorMode
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from autodeploy.kernels.beside import kernels_beside
from autodeploy.ops.sampling import choose_tokens
from autodeploy.runtime.logprobs import ROWS_AT_ONCE_ON_CPU
from autodeploy.runtime.request import Limits, Request, SamplingParams, Sequence
from autodeploy.runtime.sampler import Choice, Sampler

# Chi-square quantiles at 1 - 1e-4: with fixed seeds a correct sampler passes or fails once and for all.
CRITICAL = {1: 15.1, 2: 18.4, 3: 21.1, 4: 23.5, 5: 25.7, 6: 27.9, 7: 29.9, 8: 31.8, 9: 33.7, 10: 35.6, 11: 37.4}


@pytest.fixture(autouse=True, params=["row by row", "native"])
def _chooser(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it twice: as where there is no compiler, and by the kernel for the CPU."""
    if request.param == "row by row":
        return
    kernel = kernels_beside(1000, torch.float32, torch.device("cpu")).get("choose_tokens")
    prepare = Sampler.__post_init__
    if kernel is None:
        pytest.skip("no native kernels here")

    def with_kernel(sampler: Sampler) -> None:
        prepare(sampler)
        sampler.choose_tokens = sampler.choose_tokens or kernel.function

    monkeypatch.setattr(Sampler, "__post_init__", with_kernel)


def make_sequence(
    prompt: list[int] = [0],  # noqa: B006
    output: list[int] = [],  # noqa: B006
    *,
    eos: tuple[int, ...] = (),
    vocab: int = 1000,
    arrival: int = 0,
    **params: Any,
) -> Sequence:
    request = Request("r", prompt, SamplingParams(**{"max_tokens": None, **params}), arrival)
    sequence = Sequence(request, 0, Limits(vocab, 100_000, eos))
    for token_id in output:
        sequence.append(token_id)
    return sequence


def softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    exponentials = np.exp(logits - logits.max())
    return exponentials / exponentials.sum()


def expected_probabilities(logits: list[float], params: SamplingParams) -> NDArray[np.float64]:
    """Temperature, min-p, top-k, top-p, one after the other, renormalised each time, straight from the definitions."""
    p = softmax(np.array(logits, dtype=np.float64) / params.temperature)
    p = np.where(p >= params.min_p * p.max(), p, 0)
    if 0 < params.top_k < len(p):
        p = np.where(p >= np.sort(p)[-params.top_k], p, 0)
    p = p / p.sum()
    kept, mass = set(), 0.0
    for token in np.argsort(-p):
        if mass >= params.top_p:
            break
        kept.add(int(token))
        mass += p[token]
    p = np.array([value if token in kept else 0 for token, value in enumerate(p)])
    return p / p.sum()


def sample_many(logits: list[float], num: int, **params: Any) -> list[int]:
    """`num` independent draws: as many rows with the same logits, of requests that came one after the other."""
    sampler = Sampler(seed=1234)
    sequences = [make_sequence(arrival=arrival, **params) for arrival in range(num)]
    samples = sampler.sample(torch.tensor(logits).expand(num, -1), sequences)
    assert None not in samples.token_ids
    return [token for token in samples.token_ids if token is not None]


def chi_square_passes(tokens: list[int], probabilities: NDArray[np.float64]) -> bool:
    counts = np.bincount(tokens, minlength=len(probabilities))
    if counts[probabilities == 0].any():
        return False
    live = probabilities > 0
    expected = probabilities[live] * len(tokens)
    assert expected.min() > 5, "too few draws for the test to mean anything"
    degrees = int(live.sum()) - 1
    return degrees == 0 or float(((counts[live] - expected) ** 2 / expected).sum()) < CRITICAL[degrees]


LOGITS = [1.0, 0.2, -0.5, 2.0, 1.5, 0.0, -1.0, 0.9, 1.9, -0.2]


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 3.0},
        {"top_k": 1},
        {"top_k": 4},
        {"top_p": 0.7},
        {"top_p": 0.01},
        {"min_p": 0.3},
        {"top_k": 6, "top_p": 0.8},
        {"temperature": 1.7, "top_k": 7, "top_p": 0.9, "min_p": 0.15},
        {"min_p": 0.2, "top_p": 0.75},
    ],
)
def test_the_sampled_distribution_is_the_stated_one(params: dict[str, Any]) -> None:
    tokens = sample_many(LOGITS, 6000, **params)
    probabilities = expected_probabilities(LOGITS, SamplingParams(**params))
    assert chi_square_passes(tokens, probabilities)


def test_the_check_of_the_distribution_would_notice_a_wrong_one() -> None:
    tokens = sample_many(LOGITS, 4000)
    assert chi_square_passes(tokens, expected_probabilities(LOGITS, SamplingParams()))
    for wrong in ({"temperature": 1.15}, {"top_k": 9}, {"min_p": 0.06}):
        assert not chi_square_passes(tokens, expected_probabilities(LOGITS, SamplingParams(**wrong)))


def test_min_p_comes_before_top_p() -> None:
    """Of .4 .3 .2 .1, min-p 0.6 leaves .4 .3, of which top-p 0.5 keeps one; in the other order it keeps two."""
    logits = np.log([0.4, 0.3, 0.2, 0.1]).tolist()
    assert set(sample_many(logits, 200, min_p=0.6, top_p=0.5)) == {0}
    assert set(sample_many(logits, 200, top_p=0.5)) == {0, 1}


def test_a_long_tail_is_cut_where_the_whole_distribution_says() -> None:
    """Hundreds of tokens stay, thousands are too unlikely to be looked at; neighbours change nothing."""
    logits = (2.5 * np.random.default_rng(0).standard_normal(4000)).tolist()
    # A little more than what stays: at the limit float32 may round.
    kept = set(np.flatnonzero(expected_probabilities(logits, SamplingParams(top_p=0.981))).tolist())
    assert 256 < len(kept) < 2000
    sampler = Sampler(seed=0)
    alone = make_sequence(vocab=4000, top_p=0.98, seed=1)
    pair = [make_sequence(vocab=4000, top_p=0.98, seed=1), make_sequence(vocab=4000, top_k=700, top_p=0.9, seed=1)]
    seen = []
    for _ in range(100):
        (token,) = sampler.sample(torch.tensor([logits]), [alone]).token_ids
        assert token is not None
        assert sampler.sample(torch.tensor([logits] * 2), pair).token_ids[0] == token
        seen.append(token)
        for sequence in (alone, *pair):
            sequence.append(token)
    assert set(seen) <= kept
    unlikely = sorted(kept, key=logits.__getitem__)[: len(kept) // 2]
    assert set(seen) & set(unlikely), "the less likely half of what is kept is drawn from too"


def test_a_flat_distribution_has_many_likely_tokens() -> None:
    vocab = 1024
    logits = np.linspace(0, 0.01, vocab).tolist()
    for params in ({"top_p": 0.5}, {"top_k": vocab // 2}, {"min_p": 0.995}, {"top_k": 256, "top_p": 0.5}):
        probabilities = expected_probabilities(logits, SamplingParams(**params))
        tokens = sample_many(logits, 3000, vocab=vocab, **params)
        allowed = set(np.flatnonzero(probabilities).tolist())
        assert set(tokens) <= allowed | {min(allowed) - 1}, params  # the last one may differ by float32 rounding
        assert len(set(tokens)) > len(allowed) / 2


@pytest.mark.parametrize(
    ("params", "warper"),
    [
        ({"temperature": 0.7}, TemperatureLogitsWarper(0.7)),
        ({"top_k": 5}, TopKLogitsWarper(5)),
        ({"top_p": 0.6}, TopPLogitsWarper(0.6)),
        ({"min_p": 0.25}, MinPLogitsWarper(0.25)),
    ],
)
def test_each_filter_keeps_what_transformers_keeps(params: dict[str, Any], warper: Any) -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(3)) * 2
    expected = torch.softmax(warper(torch.zeros(1, 1, dtype=torch.int64), logits[None].clone()), dim=-1)[0]
    tokens = sample_many(logits.tolist(), 6000, **params)
    frequencies = np.bincount(tokens, minlength=50) / 6000
    assert not frequencies[expected.numpy() == 0].any()
    assert np.abs(frequencies - expected.numpy()).max() < 0.03


def test_ties_at_the_limit_are_all_kept() -> None:
    assert set(sample_many([1.0, 3.0, 1.0, 1.0], 400, top_k=2)) == {0, 1, 2, 3}


def processed(logits: Tensor, sequence: Sequence) -> Tensor:
    with torch.inference_mode():
        return Sampler()._penalise(logits[None], [sequence])[0].clone()


def test_penalties_are_those_of_transformers_and_the_openai_definition() -> None:
    logits = torch.randn(20, generator=torch.Generator().manual_seed(0)) * 3
    prompt, output = [1, 2, 3, 3], [3, 4, 4, 4, 19]
    ids = torch.tensor([prompt + output])
    sequence = make_sequence(prompt, output, repetition_penalty=1.7)
    expected = RepetitionPenaltyLogitsProcessor(1.7)(ids, logits[None].clone())[0]
    torch.testing.assert_close(processed(logits, sequence), expected)
    counts = torch.bincount(torch.tensor(output), minlength=20)
    sequence = make_sequence(prompt, output, frequency_penalty=0.3, presence_penalty=-0.9)
    torch.testing.assert_close(processed(logits, sequence), logits - 0.3 * counts + 0.9 * (counts > 0))
    sequence = make_sequence(prompt, output, repetition_penalty=0.5, frequency_penalty=0.3, presence_penalty=0.1)
    repeated = RepetitionPenaltyLogitsProcessor(0.5)(ids, logits[None].clone())[0]
    torch.testing.assert_close(processed(logits, sequence), repeated - 0.3 * counts - 0.1 * (counts > 0))


def test_histories_follow_the_sequence_token_by_token() -> None:
    sampler, fresh = Sampler(seed=0), make_sequence([1, 2], temperature=0, frequency_penalty=0.5)
    logits = torch.zeros(1, 8)
    logits[0, 5], logits[0, 6] = 1.2, 1.0
    for expected in (5, 6, 5, 6, 5):  # each drops by half when it is taken
        assert sampler.sample(logits, [fresh]).token_ids == [expected]
        fresh.append(expected)


def test_greedy_rows_take_the_argmax_whatever_their_neighbours_do() -> None:
    logits = torch.randn(3, 30, generator=torch.Generator().manual_seed(1))
    plain, noisy = make_sequence(temperature=0), make_sequence(temperature=2.0)
    best = logits.argmax(-1).tolist()
    assert Sampler().sample(logits, [plain] * 3).token_ids == best
    mixed = Sampler().sample(logits, [plain, noisy, make_sequence(temperature=1e-9, logprobs=0)]).token_ids
    assert (mixed[0], mixed[2]) == (best[0], best[2])
    assert Sampler().sample(logits.bfloat16(), [plain] * 3).token_ids == logits.bfloat16().argmax(-1).tolist()


def test_bfloat16_rows_are_compared_as_their_numbers_are() -> None:
    """By their bits where these tell: not below zero, not with a NaN that has the sign bit."""
    logits = (3 * torch.randn(4, 501, generator=torch.Generator().manual_seed(8))).bfloat16()
    logits[0, [7, 90]] = 20.0  # of equals the first
    plain = [make_sequence(temperature=0)] * 4
    for changed in (logits, logits - 100, torch.where(torch.arange(4)[:, None] == 2, -logits.abs(), logits)):
        assert Sampler().sample(changed, plain).token_ids == changed.float().numpy().argmax(-1).tolist()
    assert Sampler().sample(logits, plain).token_ids[0] == 7
    for bad in (math.nan, -math.nan, math.inf):
        changed = logits.clone()
        changed[1, 400] = bad
        assert [token is None for token in Sampler().sample(changed, plain).token_ids] == [False, True, False, False]
    logits[3] = -math.inf
    assert Sampler().sample(logits, plain).token_ids[3] is None


def test_a_seeded_row_is_independent_of_its_neighbours_and_of_the_batch() -> None:
    logits = torch.randn(5, 1000, generator=torch.Generator().manual_seed(2))
    params: dict[str, Any] = {"seed": 42, "top_p": 0.9, "temperature": 1.5}

    def draw(others: list[Sequence], at: int, engine_seed: int) -> list[int]:
        sampler, own, tokens = Sampler(engine_seed), make_sequence(**params), []
        for _ in range(8):
            sequences = [*others[:at], own, *others[at:]]
            rows = torch.stack([logits[(at + 1 + row) % 5] for row in range(len(sequences))])
            rows[at] = logits[0]
            token = sampler.sample(rows, sequences).token_ids[at]
            assert token is not None
            own.append(token)
            tokens.append(token)
        return tokens

    alone = draw([], 0, 0)
    assert len(set(alone)) > 3
    others = [
        make_sequence(top_k=3, arrival=1),
        make_sequence(top_p=0.999, temperature=50.0),
        make_sequence(temperature=0),
    ]
    assert draw(others, 0, 7) == draw(others, 2, 8) == alone
    assert draw([make_sequence(**params)], 0, 9) == alone, "the same seed gives the same tokens side by side"


def test_all_rows_at_once_are_drawn_like_one_row_after_the_other() -> None:
    """The CPU looks at likely tokens row by row, other devices at all rows together; greedy rows among them."""
    generator = torch.Generator().manual_seed(4)
    each: list[dict[str, Any]] = [{}, {"top_p": 0.9}, {"top_k": 40}, {"min_p": 0.01, "top_p": 0.7}, {"top_p": 0.999}]
    each += [{"temperature": 0}, {"temperature": 0.3, "logprobs": 2, "presence_penalty": 0.5, "seed": 3}]
    for given in (each, [{"top_k": k} for k in (1, 2, 9, 200, 255)], [{}, {"temperature": 0.5}], [{"temperature": 0}]):
        here, there = Sampler(seed=2), Sampler(seed=2, choose_tokens=choose_tokens.reference)
        sequences = [make_sequence(vocab=5000, arrival=at, **params) for at, params in enumerate(given)]
        seen = set()
        for _ in range(40):
            logits = 3 * torch.randn(len(given), 5000, generator=generator)
            expected, found = here.sample(logits, sequences), there.sample(logits, sequences)
            assert found.token_ids == expected.token_ids and found.logprobs == expected.logprobs
            seen.add(tuple(expected.token_ids))
            for sequence, token in zip(sequences, expected.token_ids, strict=True):
                assert token is not None
                sequence.append(token)
        assert len(seen) > 30


def test_requests_without_a_seed_have_randomness_of_their_own_wherever_they_run() -> None:
    logits = torch.zeros(1, 100_000)
    sequences = [make_sequence(arrival=arrival) for arrival in range(3)]
    together = Sampler(seed=1).sample(logits.expand(3, -1), sequences).token_ids
    assert len(set(together)) == 3
    sampler = Sampler(seed=1)
    assert [sampler.sample(logits, [each]).token_ids[0] for each in reversed(sequences)] == together[::-1]
    assert Sampler(seed=2).sample(logits.expand(3, -1), sequences).token_ids != together
    assert Sampler().sample(logits, sequences[:1]).token_ids != Sampler().sample(logits, sequences[:1]).token_ids


def test_releasing_starts_the_randomness_over_and_forgetting_is_complete() -> None:
    logits = torch.zeros(1, 1000)
    sampler, sequence = Sampler(), make_sequence(seed=3, frequency_penalty=0.1)
    first = sampler.sample(logits, [sequence]).token_ids
    sampler.release(sequence)
    sampler.release(sequence)
    assert sampler._keys == {} and sampler._histories == {}
    assert sampler.sample(logits, [sequence]).token_ids == first


def test_logprobs_are_of_the_raw_model_in_float32() -> None:
    logits = (torch.randn(2, 40, generator=torch.Generator().manual_seed(5)) * 4).bfloat16()
    sequences = [
        make_sequence([1], [2], logprobs=3, temperature=3.0, seed=1, repetition_penalty=1.5),
        make_sequence(logprobs=0, temperature=0),
    ]
    samples = Sampler().sample(logits, sequences)
    for row, (token, entries) in enumerate(zip(samples.token_ids, samples.logprobs, strict=True)):
        assert token is not None and entries is not None
        raw = logits[row].double().numpy()
        expected = raw - raw.max() - math.log(np.exp(raw - raw.max()).sum())
        assert next(iter(entries)) == token, "the sampled token comes first"
        for token_id, entry in entries.items():
            assert entry.logprob == pytest.approx(expected[token_id], abs=1e-5)
            assert np.sum(raw > raw[token_id]) < entry.rank <= np.sum(raw >= raw[token_id])
    first, second = samples.logprobs
    assert first is not None and second is not None
    assert sorted(entry.rank for entry in first.values())[:3] == [1, 2, 3] and len(first) in (3, 4)
    assert len(second) == 1 and next(iter(second.values())).rank == 1


def test_logprobs_of_more_rows_than_are_computed_together_are_those_of_each_alone() -> None:
    num_rows = 2 * ROWS_AT_ONCE_ON_CPU + 3
    logits = torch.randn(num_rows, 40, generator=torch.Generator().manual_seed(6)).bfloat16()
    sequences = [make_sequence(seed=row, logprobs=row % 4 if row % 3 else None) for row in range(num_rows)]
    together = Sampler().sample(logits, sequences)
    alone = [Sampler().sample(logits[row : row + 1], [sequence]) for row, sequence in enumerate(sequences)]
    assert together.token_ids == [each.token_ids[0] for each in alone]
    assert together.logprobs == [each.logprobs[0] for each in alone]
    assert sum(each is not None for each in together.logprobs) == 12


def test_rows_without_logprobs_have_none_and_small_vocabularies_are_no_trouble() -> None:
    samples = Sampler().sample(torch.zeros(2, 4), [make_sequence(logprobs=20), make_sequence(temperature=0)])
    assert samples.logprobs[0] is not None and len(samples.logprobs[0]) == 4 and samples.logprobs[1] is None


def test_min_tokens_masks_what_would_end_the_sequence() -> None:
    logits = torch.tensor([[9.0, 8.0, 7.0, 1.0]])
    early = make_sequence([3], [3], eos=(0,), stop_token_ids=[1], min_tokens=2, temperature=0)
    assert Sampler().sample(logits, [early]).token_ids == [2]
    early.append(2)
    assert Sampler().sample(logits, [early]).token_ids == [0]
    ignoring = make_sequence(eos=(0,), ignore_eos=True, min_tokens=2, temperature=0)
    assert Sampler().sample(logits, [ignoring]).token_ids == [0], "an ignored token ends nothing and need not be masked"
    everything = make_sequence(eos=(0, 1, 2, 3), min_tokens=1, temperature=1.0)
    assert Sampler().sample(logits, [everything]).token_ids == [None], "nothing is left to choose"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("params", [{"temperature": 0}, {"seed": 1}, {"seed": 1, "top_p": 0.5, "logprobs": 2}])
def test_an_unusable_row_is_reported_and_the_others_are_sampled(bad: float, params: dict[str, Any]) -> None:
    logits = torch.randn(3, 600, generator=torch.Generator().manual_seed(6))
    healthy = Sampler().sample(logits, [make_sequence(**params) for _ in range(3)])
    logits[1, 17] = bad
    samples = Sampler().sample(logits, [make_sequence(**params) for _ in range(3)])
    assert samples.token_ids == [healthy.token_ids[0], None, healthy.token_ids[2]]
    assert samples.logprobs == [healthy.logprobs[0], None, healthy.logprobs[2]]


def test_minus_infinity_is_a_forbidden_token_and_not_an_error() -> None:
    logits = torch.full((1, 300), -math.inf)
    assert Sampler().sample(logits, [make_sequence(temperature=0)]).token_ids == [None]
    logits[0, 5] = 0.0
    for params in ({}, {"top_p": 0.5}, {"temperature": 0}, {"temperature": 1e6}):
        assert Sampler().sample(logits, [make_sequence(**params)]).token_ids == [5]


def test_what_is_waited_for_is_the_stream_of_the_tokens_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another device may be the current one of the engine's thread."""
    streams: list[object] = []
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=streams.append))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: device)
    with FakeTensorMode():
        there = {"device": "cuda:1"}
        choice = Choice(torch.empty(3, dtype=torch.int64, **there), torch.empty(3, **there)).on_host()
    assert choice.tokens_R.is_cpu and streams == [torch.device("cuda", 1)]
