"""The native mixture of experts: sizes at the edges of blocks, crowded experts, threads, and what it does not take."""

from typing import Any

import pytest
import torch
from torch import Tensor

from autodeploy.kernels.cpu import moe as kernel
from autodeploy.kernels.cpu.moe import moe_cpu
from autodeploy.ops import moe

FACTS: dict[str, Any] = {"activation": "silu", "gated": True, "limit": None, "up_offset": 0.0}


def _sample(num_tokens: int, num_experts: int, num_choices: int, size: int, width: int, dtype: torch.dtype) -> Any:
    generator = torch.Generator().manual_seed(num_tokens * size)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(shape, generator=generator) * scale).to(dtype)

    return {
        "x": draw(num_tokens, size),
        "indices": torch.randint(0, num_experts + 1, (num_tokens, num_choices), generator=generator),
        "weights": torch.rand(num_tokens, num_choices, generator=generator),
        "gate_up": draw(num_experts, 2 * width, size, scale=size**-0.5),
        "down": draw(num_experts, size, width, scale=width**-0.5),
        "gate_up_bias": draw(num_experts, 2 * width),
        "down_bias": draw(num_experts, size),
    } | FACTS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "num_choices", "size", "width"),
    [
        (1, 1, 1, 1, 1),
        (3, 2, 1, 7, 9),
        (8, 3, 2, 33, 17),
        (5, 16, 4, 64, 40),
        (13, 2, 2, 40, 31),
        (40, 8, 1, 24, 16),
        (90, 3, 2, 290, 70),
        (1100, 2, 1, 32, 24),
    ],
)
def test_sizes(num_tokens: int, num_experts: int, num_choices: int, size: int, width: int, dtype: torch.dtype) -> None:
    sample = _sample(num_tokens, num_experts, num_choices, size, width, dtype)
    expected = moe.reference(**{k: v.float() if _is_float(v) else v for k, v in sample.items()})
    torch.testing.assert_close(
        moe_cpu(**sample).float(), expected, rtol=moe.tolerance[dtype], atol=moe.tolerance[dtype]
    )


def _is_float(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def test_threads_do_not_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = _sample(6, 5, 2, 48, 36, torch.float32)
    results = []
    for threads in (1, 2, 3):
        monkeypatch.setattr(kernel, "num_threads", lambda *_, threads=threads: threads)
        results.append(moe_cpu(**sample))
    assert all(torch.equal(result, results[0]) for result in results)


def test_a_token_is_the_same_to_the_bit_whatever_else_is_in_the_batch() -> None:
    sample = _sample(7, 4, 3, 40, 24, torch.float32)
    together = moe_cpu(**sample)
    for token in range(7):
        alone = moe_cpu(**sample | {name: sample[name][token : token + 1] for name in ("x", "indices", "weights")})
        torch.testing.assert_close(alone[0], together[token], rtol=1e-6, atol=1e-6)


def test_steps_aside_for_other_layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = _sample(4, 3, 2, 16, 12, torch.float32)
    sample["down"] = sample["down"].mT.contiguous().mT
    monkeypatch.setattr(kernel, "_moe", {})  # a call of the native function would be a KeyError
    assert torch.equal(moe_cpu(**sample), moe.reference(**sample))
