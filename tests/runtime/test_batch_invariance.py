"""With `batch_invariant`, what a request gets is bit for bit the same alone, in any crowd, in chunks and behind known
prefixes; without it the same comparison finds differences.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from autodeploy.build import build
from autodeploy.compile.program import Program
from autodeploy.config import EngineOptions, parse_options
from autodeploy.runtime.engine import Engine
from autodeploy.runtime.request import SamplingParams
from tests import tiny

MODELS: dict[str, Callable[[], nn.Module]] = {
    "attention": tiny.TINY["llama"],
    "attention in bfloat16": lambda: tiny.TINY["llama"]().bfloat16(),
    "experts and windows": tiny.TINY["gpt_oss"],
    "scans and attention": tiny.HYBRID["bamba"],
}

Jobs = dict[str, tuple[list[int], SamplingParams]]


def built(model: nn.Module | str, *, is_invariant: bool = True, **options: Any) -> Program:
    return build(model, parse_options({"batch_invariant": is_invariant, "check_isolation": False, **options}))


def jobs(program: Program, seed: int, count: int = 10) -> Jobs:
    """Requests of every kind, some with prompts that begin alike."""
    chance = random.Random(seed)
    common = [chance.randrange(200) for _ in range(40)]
    made = {}
    for index in range(count):
        prompt = common[: chance.choice([0, 0, 17, 40])] + [chance.randrange(200) for _ in range(chance.randint(1, 24))]
        temperature = chance.choice([0.0, 0.9])
        made[f"r{index}"] = (
            prompt,
            SamplingParams(
                temperature=temperature,
                seed=index,
                max_tokens=chance.randint(2, 9),
                logprobs=2,
                prompt_logprobs=chance.choice([None, 1]),
                repetition_penalty=chance.choice([1.0, 1.2]),
            ),
        )
    return made


def answers(program: Program, made: Jobs, seed: int | None, **options: Any) -> dict[str, Any]:
    """Tokens and log-probabilities of each request; with a seed they arrive at random while others run."""
    chance = random.Random(seed)
    chosen = EngineOptions(**{"page_size": 8, "max_num_seqs": 8, **options})
    got: dict[str, Any] = {name: ([], [], []) for name in made}
    waiting = list(made)
    engine = Engine(program, chosen, 128)
    if seed is not None:
        chance.shuffle(waiting)
    while waiting or engine.has_unfinished_requests():
        while waiting and (not engine.has_unfinished_requests() or (seed is not None and chance.random() < 0.6)):
            name = waiting.pop()
            engine.add_request(name, *made[name])
        for output in engine.step():
            kinds = (output.token_ids, output.logprobs, output.prompt_logprobs)
            for whole, part in zip(got[output.request_id], kinds, strict=True):
                whole.extend(part or [])
    return got


def alone(program: Program, made: Jobs) -> dict[str, Any]:
    return {name: answers(program, {name: job}, None, enable_prefix_caching=False)[name] for name, job in made.items()}


def crowds(program: Program, made: Jobs, seed: int) -> list[dict[str, Any]]:
    return [
        answers(program, made, seed),
        answers(program, made, seed + 1, max_num_batched_tokens=11),
        answers(program, made, seed + 2, max_num_seqs=3, speculative_config={"prompt_lookup_min": 1}),
    ]


@pytest.mark.parametrize("name", MODELS)
def test_a_request_gets_the_same_bits_in_any_crowd(name: str) -> None:
    program = built(MODELS[name]())
    made = jobs(program, seed=1)
    expected = alone(program, made)
    for crowd in crowds(program, made, seed=2):
        assert crowd == expected


def test_without_the_option_the_comparison_finds_differences() -> None:
    program = built(MODELS["attention"](), is_invariant=False)
    made = jobs(program, seed=1)
    expected = alone(program, made)
    assert any(crowd != expected for crowd in crowds(program, made, seed=2)[:2])


@pytest.mark.slow
@pytest.mark.real_model
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_real_model_gives_the_same_bits_in_any_crowd(dtype: str, smollm2: Path) -> None:
    program = built(str(smollm2), dtype=dtype)
    made = jobs(program, seed=3, count=6)
    expected = alone(program, made)
    for crowd in crowds(program, made, seed=4):
        assert crowd == expected
