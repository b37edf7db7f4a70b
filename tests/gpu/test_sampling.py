"""Tokens chosen on CUDA: those of the CPU for every filter, at real vocabularies, without a wait for the device."""

from typing import Any

import numpy as np
import pytest
import torch

from autodeploy.build import build
from autodeploy.config import EngineOptions, parse_options
from autodeploy.kernels import provider
from autodeploy.ops import choose_tokens
from autodeploy.runtime.draw import draw
from autodeploy.runtime.engine import Engine
from autodeploy.runtime.random_numbers import uniforms
from autodeploy.runtime.request import SamplingParams
from tests import tiny
from tests.captured import facts
from tests.engines import generated

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: nothing of this file was tested here"),
]

FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.6, "top_p": 0.95, "top_k": 20},
    {"top_p": 0.9},
    {"top_k": 40},
    {"min_p": 0.05},
    {"temperature": 8.0, "top_p": 0.99},
]


def arguments(params: list[SamplingParams], vocab_size: int, seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    keys = np.random.default_rng(seed).integers(0, 1 << 64, len(params), dtype=np.uint64)
    return {
        "logits": 3 * torch.randn(len(params), vocab_size, generator=generator),
        "temperature": torch.tensor([p.temperature for p in params]),
        "top_k": torch.tensor([p.top_k for p in params]),
        "top_p": torch.tensor([p.top_p for p in params]),
        "min_p": torch.tensor([p.min_p for p in params]),
        "keys": torch.from_numpy(keys.view(np.int64)),
        "positions": torch.arange(len(params)),
    }


@pytest.mark.parametrize("repeats", [1, 40])
@pytest.mark.parametrize("vocab_size", [1000, 128256])
def test_the_kernel_draws_what_the_cpu_draws(vocab_size: int, repeats: int) -> None:
    """All but a few in a thousand rows: exponentials are rounded differently, and a number may fall between."""
    kernel = provider.kernel_for(
        choose_tokens, torch.device("cuda"), logits=torch.empty(1, 8, device="cuda"), **_none()
    )
    assert kernel is not None and kernel.provider == "triton"
    params = [SamplingParams(**given) for given in FILTERS] * repeats
    given = arguments(params, vocab_size, seed=repeats)
    numbers = uniforms(given["keys"].numpy().view(np.uint64).tolist(), range(len(params)), len(params))
    expected = draw(given["logits"], given["logits"].max(-1).values, params, numbers)
    torch.cuda.set_sync_debug_mode("error")
    try:
        tokens, best = kernel.function(
            **{name: value.pin_memory().cuda(non_blocking=True) for name, value in given.items()}
        )
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (tokens.cpu() != expected).sum() <= len(params) // 200
    assert torch.equal(best.cpu(), given["logits"].max(-1).values)


@pytest.mark.parametrize("given", [{"temperature": 0.0}, {"temperature": 0.5, "seed": 3, "top_p": 0.9}], ids=str)
def test_drafts_are_verified_on_the_device_and_change_no_token(given: dict[str, Any]) -> None:
    prompts = [prompt * 3 for prompt in tiny.prompts(4, seed=9, longest=8)]
    params = SamplingParams(max_tokens=24, ignore_eos=True, **given)
    built = build(tiny.TINY["llama"](), parse_options({"device": "cuda"}))
    assert built.report.kernels["accept_drafts"] == {"triton": 1}
    found = []
    for drafts in (None, {"method": "ngram", "prompt_lookup_min": 1, "num_speculative_tokens": 4}):
        options = EngineOptions(max_num_batched_tokens=64, page_size=4, speculative_config=drafts)
        engine = Engine(built, options, max_model_len=96)
        found.append(generated(engine, prompts, params))
    assert found[0] == found[1] and engine.stats().draft_tokens > 0


@pytest.mark.parametrize("is_asynchronous", [True, False])
def test_tokens_chosen_in_graphs_are_those_chosen_behind_them(is_asynchronous: bool) -> None:
    prompts = tiny.prompts(len(FILTERS) + 1, seed=4, longest=12)
    found = []
    for backend in ("torch-cudagraph", "torch-simple"):
        built = build(tiny.TINY["llama"](), parse_options({"device": "cuda", "compile_backend": backend}))
        options = EngineOptions(page_size=4, max_num_seqs=5, seed=2, async_scheduling=is_asynchronous)
        engine = Engine(built, options, max_model_len=96)
        tokens: dict[str, list[int]] = {}
        for index, (prompt, given) in enumerate(zip(prompts, [{"temperature": 0.0}, *FILTERS], strict=True)):
            engine.add_request(str(index), prompt, SamplingParams(max_tokens=8 + index, ignore_eos=True, **given))
        while engine.has_unfinished_requests():
            for output in engine.step():
                tokens.setdefault(output.request_id, []).extend(output.token_ids)
        found.append(tokens)
        if backend == "torch-cudagraph":
            counted = facts(built)
            assert counted["chosen"]["in the graph"] == counted["steps"]["whole"] > 5
    assert found[0] == found[1]


def _none() -> dict[str, None]:
    return dict.fromkeys(name for name in choose_tokens.parameters if name != "logits")
