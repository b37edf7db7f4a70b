"""Every pair of features in one request: what docs/serving.md says works does, and what it refuses is refused."""

import itertools
import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest

from autodeploy.server.options import NAMES
from tests.server.running import Start, random_engine

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
FEATURES: dict[str, dict[str, Any]] = {
    "stream": {"stream": True},
    "n": {"n": 2},
    "prompts": {"prompt": ["hello", "world"]},
    "logprobs": {"logprobs": 2},
    "prompt_logprobs": {"prompt_logprobs": 1},
    "echo": {"echo": True},
    "stop": {"stop": ["the end"]},
    "penalties": {"presence_penalty": 0.5, "frequency_penalty": 0.5, "repetition_penalty": 1.1},
    "seed": {"seed": 7, "temperature": 0.9, "top_p": 0.9, "top_k": 50, "min_p": 0.01},
    "biases": {"logit_bias": {"70": 2}, "bad_words": ["hello"]},
    "min_tokens": {"min_tokens": 3},
    "ignore_eos": {"ignore_eos": True},
    "structured": {"guided_regex": "[ab]{3,5}"},
    "salt": {"cache_salt": "one", "priority": 1},
}


def rows(heading: str) -> list[list[str]]:
    section = PAGE.partition(f"\n## {heading}\n")[2].partition("\n##")[0]
    return [re.findall(r"`([a-z_]+)`", line) for line in section.splitlines() if line.startswith("| `")]


def answered(response: httpx.Response, wanted: dict[str, Any]) -> bool:
    """Whether there is a complete answer that shows what was asked for."""
    if not wanted.get("stream"):
        pieces = response.json()["choices"]
    else:
        events = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
        if events[-1] != "[DONE]":
            return False
        pieces = [choice for event in events[:-1] for choice in json.loads(event)["choices"]]
    count = wanted.get("n", 1) * (2 if isinstance(wanted["prompt"], list) else 1)
    texts = ["".join(piece["text"] for piece in pieces if piece["index"] == index) for index in range(count)]
    ended = {piece["index"] for piece in pieces if piece["finish_reason"] in ("stop", "length")}
    has_logprobs = all(piece["logprobs"] for piece in pieces if piece["text"]) or "logprobs" not in wanted
    begun = [text.removeprefix("hello").removeprefix("world") for text in texts] if "echo" in wanted else texts
    fits = "guided_regex" not in wanted or all(re.fullmatch(wanted["guided_regex"], text) for text in begun)
    return ended == set(range(count)) and has_logprobs and fits


@pytest.mark.parametrize("options", [{}, {"speculative_config": {"prompt_lookup_min": 1}}], ids=["plain", "drafts"])
def test_every_pair(start: Start, options: dict[str, Any]) -> None:
    refused = {frozenset(row[:2]) for row in rows("What combines")}
    assert len(refused) == 3 and all(pair <= FEATURES.keys() for pair in refused)
    server = start(random_engine(**options))
    wrong = []
    with httpx.Client(base_url=server.url, timeout=120) as client:
        for pair in itertools.combinations(FEATURES, 2):
            body = {"prompt": "hello", "max_tokens": 6} | FEATURES[pair[0]] | FEATURES[pair[1]]
            response = client.post("/v1/completions", json=body)
            works = response.status_code == 200 and answered(response, body)
            if works == (frozenset(pair) in refused) or response.status_code not in (200, 400):
                wrong.append((pair, response.status_code, response.text[:300]))
    assert not wrong, wrong
    if options:
        (line,) = re.findall(
            r"vllm:spec_decode_num_draft_tokens_total{.*} (.*)", httpx.get(f"{server.url}/metrics").text
        )
        assert float(line) > 0, "nothing was drafted"


def test_the_page_has_every_option() -> None:
    assert {name for row in rows("Options of the server") for name in row} >= NAMES


def test_the_page_has_every_field(start: Start) -> None:
    schemas = httpx.get(f"{start().url}/openapi.json").json()["components"]["schemas"]
    fields = {*schemas["CompletionRequest"]["properties"], *schemas["ChatCompletionRequest"]["properties"]}
    missing = {name for name in fields if f"`{name}`" not in PAGE} - {"prompt", "add_special_tokens"}
    assert not missing
