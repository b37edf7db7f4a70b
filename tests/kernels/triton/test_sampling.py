"""choose_tokens in Triton draws what the CPU draws, row by row: long rows in parts, many candidates, odd numbers."""

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from autodeploy.kernels import provider
from autodeploy.ops import choose_tokens
from autodeploy.ops.sampling import uniform_numbers
from autodeploy.runtime.draw import draw
from autodeploy.runtime.random_numbers import uniforms
from autodeploy.runtime.request import SamplingParams

CUDA = torch.device("cuda")
IS_INTERPRETED = not provider.unavailable(CUDA) and not torch.cuda.is_available()

pytestmark = pytest.mark.skipif(not IS_INTERPRETED, reason="runs in Triton's interpreter, on CPU tensors")

FILTERS: list[dict[str, Any]] = [
    {},
    {"top_p": 0.9},
    {"top_k": 40},
    {"top_k": 1},
    {"min_p": 0.01, "top_p": 0.7},
    {"top_p": 0.9999},
    {"top_k": 3000, "top_p": 0.95, "min_p": 1e-4},
    {"temperature": 0.3, "top_p": 0.5},
    {"temperature": 20.0, "top_k": 4999},
]


def columns(params: list[SamplingParams], seed: int) -> dict[str, Tensor]:
    keys = np.random.default_rng(seed).integers(0, 1 << 64, len(params), dtype=np.uint64)
    return {
        "temperature": torch.tensor([p.temperature for p in params]),
        "top_k": torch.tensor([p.top_k for p in params], dtype=torch.int32),
        "top_p": torch.tensor([p.top_p for p in params]),
        "min_p": torch.tensor([p.min_p for p in params]),
        "keys": torch.from_numpy(keys.view(np.int64)),
        "positions": torch.arange(len(params)) * 1000,
    }


def chosen(logits: Tensor, given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    arguments = dict.fromkeys(choose_tokens.parameters) | given | {"logits": logits}
    assert choose_tokens.kernels["triton"].supports(**arguments) is None
    tokens, best = choose_tokens.kernels["triton"].function(**arguments)
    return tokens, best


def drawn_on_the_cpu(logits: Tensor, params: list[SamplingParams], given: dict[str, Tensor]) -> Tensor:
    keys = given["keys"].numpy().view(np.uint64).tolist()
    numbers = uniforms(keys, given["positions"].tolist(), len(params))
    return draw(logits, logits.float().max(-1).values, params, numbers)


def test_random_numbers_are_those_of_the_runtime() -> None:
    keys = np.random.default_rng(0).integers(0, 1 << 64, 1000, dtype=np.uint64)
    positions = torch.arange(1000) * 977
    expected = uniforms(keys.tolist(), positions.tolist(), 1000)
    assert uniform_numbers(torch.from_numpy(keys.view(np.int64)), positions).numpy().tolist() == expected.tolist()


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))])
def test_draws_what_the_cpu_draws(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from autodeploy.kernels.triton import sampling

    monkeypatch.setattr(sampling, "num_processors", lambda _: 40)
    monkeypatch.setattr(sampling, "_LEAST_TOKENS_OF_PART", 600)
    torch.manual_seed(seed)
    params = [SamplingParams(**given) for given in FILTERS]
    logits = 3 * torch.randn(len(params), 5000)  # in eight parts
    given = columns(params, seed)
    assert chosen(logits, given)[0].tolist() == drawn_on_the_cpu(logits, params, given).tolist()


def test_more_candidates_than_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    from autodeploy.kernels.triton import sampling

    monkeypatch.setattr(sampling, "_CAPACITY", 300)
    torch.manual_seed(5)
    params = [SamplingParams(**given) for given in FILTERS[1:5]]
    logits = torch.randn(len(params), 1200)
    given = columns(params, 5)
    assert chosen(logits, given)[0].tolist() == drawn_on_the_cpu(logits, params, given).tolist()


def test_ties_at_the_limit_are_all_kept() -> None:
    logits = torch.full((12, 4), 1.0)
    logits[:, 1] = 3.0
    params = [SamplingParams(top_k=2, temperature=4.0)] * 12
    given = columns(params, 0)
    tokens, _ = chosen(logits, given)
    assert len(set(tokens.tolist())) > 2
    assert tokens.tolist() == drawn_on_the_cpu(logits, params, given).tolist()


def test_a_flat_row_gives_tokens_from_end_to_end() -> None:
    params = [SamplingParams(), SamplingParams(min_p=0.5)] * 4
    tokens, _ = chosen(torch.zeros(8, 3000), columns(params, 1))
    assert len(set(tokens.tolist())) > 6 and min(tokens) < 1000 and max(tokens) > 2000


def test_rows_that_are_views_and_bfloat16() -> None:
    torch.manual_seed(3)
    logits = torch.randn(6, 1000).bfloat16()[::2, :777]
    params = [SamplingParams(temperature=0.5, top_p=0.8)] * 3
    given = columns(params, 3)
    assert chosen(logits, given)[0].tolist() == drawn_on_the_cpu(logits, params, given).tolist()
    transposed = logits.t().contiguous().t()
    assert chosen(transposed, given)[0].tolist() == chosen(logits, given)[0].tolist()


def test_unusable_rows_are_told_by_their_best_logit_and_disturb_no_other() -> None:
    torch.manual_seed(4)
    params = [SamplingParams(top_p=0.8), SamplingParams(), SamplingParams(top_k=3), SamplingParams(min_p=0.1)]
    logits = torch.randn(4, 900)
    given = columns(params, 4)
    expected, _ = chosen(logits, given)
    spoilt = logits.clone()
    spoilt[0, 17], spoilt[1, 800], spoilt[3] = math.nan, math.inf, -math.inf
    for arguments in (given, {}):
        tokens, best = chosen(spoilt, arguments)
        assert best.isfinite().tolist() == [False, False, True, False]
        assert ((tokens >= 0) & (tokens < 900)).all()
        assert tokens[2] == (expected[2] if arguments else logits[2].argmax())


def test_masked_tokens_are_never_drawn() -> None:
    logits = torch.full((12, 700), -torch.inf)
    logits[:, [3, 699]] = 0.0
    params = [SamplingParams(temperature=9.0), SamplingParams(top_p=0.99)] * 6
    assert set(chosen(logits, columns(params, 6))[0].tolist()) == {3, 699}


def test_one_temperature_of_zero_among_others_takes_the_first_of_the_best() -> None:
    logits = torch.zeros(3, 400)
    logits[:, [20, 300]] = 5.0
    tokens, best = chosen(logits, columns([SamplingParams(temperature=t) for t in (0.0, 1.0, 0.0)], 7))
    assert tokens[0] == tokens[2] == 20 and best.tolist() == [5.0] * 3


def test_rows_that_nobody_looks_at_are_not_read_and_disturb_no_other() -> None:
    torch.manual_seed(8)
    params = [SamplingParams(top_p=0.8), SamplingParams(), SamplingParams(top_k=3)]
    logits, given = torch.randn(3, 900), columns(params, 8)
    expected = drawn_on_the_cpu(logits, params, given)
    given["temperature"][1] = -1.0
    for arguments in (given, given | dict.fromkeys(("top_k", "top_p", "min_p"))):
        tokens, best = chosen(logits, arguments)
        assert best[1] == -torch.inf and best[0] == logits[0].max() and best[2] == logits[2].max()
        assert 0 <= tokens[1] < 900
        if arguments is given:
            assert [tokens[0], tokens[2]] == [expected[0], expected[2]]


@pytest.mark.parametrize("place", [0, 1])
def test_parts_are_read_in_steps_of_any_size(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from autodeploy.kernels.triton import sampling

    monkeypatch.setattr(sampling, "num_processors", lambda _: 4)
    one = sampling._find_best_parts.configurations[place]
    monkeypatch.setattr(sampling._find_best_parts, "configurations", [one])
    torch.manual_seed(9)
    logits = torch.randn(2, 11000)  # in four parts, which no step divides
    logits[0, [2999, 8500]] = 9.0
    tokens, best = chosen(logits, {})
    assert torch.equal(tokens, logits.argmax(-1)) and tokens[0] == 2999 and torch.equal(best, logits.max(-1).values)
