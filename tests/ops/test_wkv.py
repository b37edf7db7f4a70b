"""wkv against transformers' loop over tokens, and where weights leave the range of float32."""

import torch
from transformers.models.rwkv.modeling_rwkv import rwkv_linear_attention_cpu

from autodeploy.ops import wkv

BORDERS = [(0, 1), (1, 20), (20, 77)]


def test_is_the_loop_of_each_sequence() -> None:
    log_decay, bonus = torch.linspace(-4.0, 2.0, 12), torch.randn(12)
    key, value = 4 * torch.randn(1, 77, 12), torch.randn(1, 77, 12)
    result = wkv(key, value, -log_decay.exp(), bonus, torch.tensor([0, 1, 20, 77], dtype=torch.int32))
    expected = [rwkv_linear_attention_cpu(log_decay, bonus, key[:, a:b], value[:, a:b])[0] for a, b in BORDERS]
    torch.testing.assert_close(result, torch.cat(expected, dim=1), rtol=1e-5, atol=1e-5)


def test_weights_that_overflow_or_vanish_are_weighed_against_each_other() -> None:
    value = torch.tensor([1.0, 5.0, 3.0]).reshape(1, 3, 1)
    for level in (-400.0, 0.0, 400.0):
        result = wkv(torch.full((1, 3, 1), level), value, torch.zeros(1), torch.zeros(1), None)
        torch.testing.assert_close(result.flatten(), torch.tensor([1.0, 3.0, 3.0]))
