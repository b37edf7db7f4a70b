"""The native mixture with quantised experts: crowded experts, bits, groups, threads, and what it refuses."""

from typing import Any

import pytest
import torch
from torch import Tensor

from autodeploy.checkpoint.quantize import NumberFormat, quantize_rows
from autodeploy.kernels.cpu import quantized_moe as kernel
from autodeploy.kernels.cpu.quantized_moe import quantized_moe_cpu
from autodeploy.ops import quantized_moe

FORMATS = [
    NumberFormat(8, None),
    NumberFormat(8, 32, has_offsets=True),
    NumberFormat(4, 32),
    NumberFormat(4, 32, has_offsets=True),
]


def _sample(
    num_tokens: int, num_experts: int, num_choices: int, size: int, width: int, number_format: NumberFormat
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(num_tokens * size)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    up = quantize_rows(draw(num_experts * 2 * width, size) * size**-0.5, number_format)
    down = quantize_rows(draw(num_experts * size, width) * width**-0.5, number_format)
    return {
        "x": draw(num_tokens, size),
        "indices": torch.randint(0, num_experts + 1, (num_tokens, num_choices), generator=generator),
        "weights": torch.rand(num_tokens, num_choices, generator=generator),
        "gate_up": up["numbers"],
        "gate_up_scales": up["scales"],
        "gate_up_offsets": up.get("offsets"),
        "down": down["numbers"],
        "down_scales": down["scales"],
        "down_offsets": down.get("offsets"),
        "gate_up_bias": draw(num_experts, 2 * width),
        "down_bias": draw(num_experts, size),
        "num_experts": num_experts,
        "activation": "silu",
        "gated": True,
        "limit": None,
        "up_offset": 0.0,
    }


SIZES = [
    (1, 1, 1, 32, 32),
    (3, 2, 1, 32, 64),
    (8, 3, 2, 64, 32),
    (5, 16, 4, 64, 96),
    (40, 8, 1, 32, 32),
    (90, 2, 2, 96, 64),
]
"""tokens, experts, choices, size, width"""


@pytest.mark.parametrize("number_format", FORMATS, ids=str)
def test_sizes(number_format: NumberFormat) -> None:
    errors = []
    for sizes in SIZES:
        sample = _sample(*sizes, number_format)
        errors += (quantized_moe_cpu(**sample) - quantized_moe.reference(**sample)).abs().amax(-1).tolist()
    # A value on the border of two levels may go to either, as sums differ in their last bits; few tokens have one.
    assert max(errors) < 3e-2 and sorted(errors)[len(errors) // 2] < 1e-5


def test_sizes_without_whole_blocks() -> None:
    sample = _sample(5, 3, 2, 48, 16, FORMATS[0])
    torch.testing.assert_close(quantized_moe_cpu(**sample), quantized_moe.reference(**sample), rtol=3e-2, atol=3e-2)


def test_threads_and_neighbours_do_not_change_a_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    sample = _sample(21, 3, 2, 64, 96, FORMATS[3])
    together = quantized_moe_cpu(**sample)
    for threads in (1, 2, 3):
        monkeypatch.setattr(kernel, "num_threads", lambda *_, threads=threads: threads)
        assert torch.equal(quantized_moe_cpu(**sample), together)
    for token in (0, 7, 20):
        alone = {name: sample[name][token : token + 1] for name in ("x", "indices", "weights")}
        assert torch.equal(quantized_moe_cpu(**sample | alone)[0], together[token])


def test_a_choice_of_no_expert_and_no_tokens_add_nothing() -> None:
    sample = _sample(4, 3, 2, 32, 32, FORMATS[2])
    sample["indices"] = torch.full((4, 2), 3)
    assert quantized_moe_cpu(**sample).eq(0).all()
    none = {name: sample[name][:0] for name in ("x", "indices", "weights")}
    assert quantized_moe_cpu(**sample | none).shape == (0, 32)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"activation": "mish"}, "activation 'mish'"),
        ({"down_scales": torch.ones(6, 1, 16)}, "scales torch.float32"),
        ({"gate_up": torch.zeros(1)}, "packed numbers"),
        ({"x": torch.zeros(4, 33)}, "no whole tiles"),
        ({"x": torch.zeros(4, 32).double()}, "dtype torch.float64"),
    ],
)
def test_refuses_with_the_reason(change: dict[str, Any], reason: str) -> None:
    sample = _sample(4, 3, 2, 32, 32, FORMATS[0])
    supports = quantized_moe.kernels["cpu"].supports
    assert supports(**sample) is None
    assert reason in (supports(**sample | change) or "")
