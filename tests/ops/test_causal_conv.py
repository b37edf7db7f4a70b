"""Causal convolution against transformers' own function, sequence by sequence, and its window at the edges."""

import itertools

import pytest
import torch
from transformers.models.mamba.modeling_mamba import causal_conv1d_fn

from autodeploy.ops import cached_causal_conv, causal_conv


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("taps", [2, 4, 7])
@pytest.mark.parametrize("activation", [None, "silu"])
def test_each_sequence_is_transformers_convolution(taps: int, activation: str | None, dtype: torch.dtype) -> None:
    x, weight, bias = (torch.randn(shape).to(dtype) for shape in ((1, 17, 6), (6, taps), (6,)))
    borders = [0, 2, 3, 17]
    result = causal_conv.reference(x, weight, bias, activation, torch.tensor(borders, dtype=torch.int32))
    for start, end in itertools.pairwise(borders):
        expected = causal_conv1d_fn(x[:, start:end].transpose(1, 2), weight, bias, activation=activation)
        torch.testing.assert_close(result[:, start:end].transpose(1, 2), expected)


def test_without_boundaries_the_row_is_one_sequence() -> None:
    x, weight = torch.randn(1, 9, 6), torch.randn(6, 4)
    whole = causal_conv.reference(x, weight, None, None, torch.tensor([0, 9]))
    torch.testing.assert_close(causal_conv.reference(x, weight, None, None, None), whole)


def test_only_the_given_slots_are_written() -> None:
    window = torch.randn(5, 3, 6)
    before = window.clone()
    slots, boundaries = torch.tensor([4, 2], dtype=torch.int32), torch.tensor([0, 1, 2], dtype=torch.int32)
    x = torch.randn(1, 2, 6)
    cached_causal_conv.reference(x, torch.randn(6, 4), None, None, boundaries, slots, window)
    torch.testing.assert_close(window[[0, 1, 3]], before[[0, 1, 3]], rtol=0, atol=0)
    torch.testing.assert_close(window[4], torch.cat((before[4, 1:], x[0, :1])), rtol=0, atol=0)
