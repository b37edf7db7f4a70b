"""Every pair of engine options, with requests of every kind at once: each gets what it gets alone from a plain engine.

The pairs of features in one request are tests/server/test_combinations.py; docs/serving.md has the table of both.
"""

import itertools
import re
from pathlib import Path
from typing import Any

import pytest

from autodeploy.config import EngineOptions, parse_options
from autodeploy.errors import ConfigError
from autodeploy.runtime.engine import Engine
from autodeploy.runtime.request import SamplingParams
from tests.runtime.toy import toy_program

LAYERS = ("full", "window", "slot")
DRAFTS = {"num_speculative_tokens": 3}
ENGINE: dict[str, dict[str, Any]] = {
    "ngram": {"speculative_config": {**DRAFTS, "prompt_lookup_min": 1}},
    "draft model": {"speculative_config": {**DRAFTS, "model": "the same layers, with errors"}},
    "head": {"speculative_config": {**DRAFTS, "method": "eagle", "model": "a head of the program, with errors"}},
    "steps in flight": {"async_scheduling": True},
    "no prefix cache": {"enable_prefix_caching": False},
    "chunks": {"max_num_batched_tokens": 11},
    "few at once": {"max_num_seqs": 2},
    "short memory": {"kv_cache_memory_bytes": 6000},
}
REQUESTS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "seeded": {"seed": 5, "top_p": 0.9, "top_k": 12},
    "penalties": {"temperature": 0, "presence_penalty": 0.5, "frequency_penalty": 0.2, "repetition_penalty": 1.2},
    "logprobs": {"temperature": 0, "logprobs": 2},
    "prompt_logprobs": {"temperature": 0, "prompt_logprobs": 1},
    "n": {"n": 3, "seed": 6},
    "biases": {"temperature": 0, "logit_bias": {4: 0.4}, "bad_token_sequences": [[3], [1, 2]]},
    "min_tokens": {"temperature": 0, "min_tokens": 6, "stop_token_ids": [1, 2, 3, 4, 5]},
    "stop": {"temperature": 0, "stop_token_ids": [9]},
}


def answers(wanted: list[str], **options: Any) -> dict[tuple[str, int], Any]:
    """Tokens, log-probabilities and reason to end of every sequence, by request and index."""
    program = toy_program(LAYERS, head_errs_every=3)
    engine = Engine(
        program,
        EngineOptions(**{"page_size": 4, "max_num_seqs": 6, **options}),
        64,
        draft=toy_program(LAYERS, err_every=3),
    )
    got: dict[tuple[str, int], Any] = {}
    for at, name in enumerate(wanted):
        prompt = [1, 2, 3, 4, 1, 2, 3, 4, 5][: 5 + at % 5]
        engine.add_request(name, prompt, SamplingParams(max_tokens=14, ignore_eos=True, **REQUESTS[name]))
    while engine.has_unfinished_requests():
        for output in engine.step():
            entry = got.setdefault((output.request_id, output.index), {"tokens": [], "logprobs": []})
            entry["tokens"] += output.token_ids
            entry["logprobs"] += [*(output.prompt_logprobs or ()), *(output.logprobs or ())]
            entry["reason"] = output.finish_reason
    return got


@pytest.fixture(scope="module")
def expected() -> dict[tuple[str, int], Any]:
    return answers(list(REQUESTS))


PAIRS = [pair for pair in itertools.combinations(ENGINE, 2) if not ENGINE[pair[0]].keys() & ENGINE[pair[1]].keys()]


@pytest.mark.parametrize(("one", "other"), PAIRS)
def test_every_pair_of_options(one: str, other: str, expected: dict[tuple[str, int], Any]) -> None:
    assert answers(list(REQUESTS), **ENGINE[one], **ENGINE[other]) == expected


PAGE = Path(__file__).resolve().parents[2] / "docs" / "serving.md"
OPTIONS: dict[str, dict[str, Any]] = {
    "speculative_config": {"speculative_config": {"method": "ngram"}},
    "runtime=demollm": {"runtime": "demollm"},
    "batch_invariant": {"batch_invariant": True},
    "compile_backend=replay": {"compile_backend": "replay"},
    "compile_backend=torch-compile": {"compile_backend": "torch-compile"},
    "attn_backend=torch": {"attn_backend": "torch"},
    "quantization": {"quantization": "int8"},
    "kv_cache_dtype": {"kv_cache_dtype": "fp8"},
    "async_scheduling": {"async_scheduling": True},
    "enable_prefix_caching": {"enable_prefix_caching": True},
}


def test_the_page_has_the_pairs_of_options_that_are_refused() -> None:
    section = PAGE.read_text(encoding="utf-8").partition("\n### Options\n")[2].partition("\n## ")[0]
    rows = [re.findall(r"`([a-z_=-]+)`", line)[:2] for line in section.splitlines() if line.startswith("| `")]
    refused = set()
    for one, other in itertools.combinations(OPTIONS, 2):
        if OPTIONS[one].keys() & OPTIONS[other].keys():
            continue
        try:
            parse_options(OPTIONS[one] | OPTIONS[other])
        except ConfigError:
            refused.add(frozenset((one, other)))
    assert {frozenset(row) for row in rows} == refused and len(refused) == len(rows)
