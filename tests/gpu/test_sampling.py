"""Tokens chosen on CUDA: those of the CPU for every filter, at real vocabularies, without a wait for the device."""

from typing import Any

import numpy as np
import pytest
import torch

from autodeploy.kernels import provider
from autodeploy.ops import choose_tokens
from autodeploy.runtime.draw import draw
from autodeploy.runtime.random_numbers import uniforms
from autodeploy.runtime.request import SamplingParams

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


def _none() -> dict[str, None]:
    return dict.fromkeys(name for name in choose_tokens.parameters if name != "logits")
