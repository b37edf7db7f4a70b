"""linear_attention against the formula, token by token, and against transformers' blocks of lightning attention."""

import pytest
import torch
from transformers import MiniMaxConfig
from transformers.models.minimax.modeling_minimax import MiniMaxLightningAttention

from autodeploy.ops import linear_attention


@pytest.mark.parametrize("channels", [1, 8])
def test_is_the_recurrence_of_each_sequence(channels: int) -> None:
    query, key, value = torch.randn(1, 150, 2, 8), torch.randn(1, 150, 2, 8), torch.randn(1, 150, 2, 6)
    decay = -3 * torch.rand(1, 150, 2, channels)
    result = linear_attention(query, key, value, decay, None, torch.tensor([0, 1, 20, 150], dtype=torch.int32))
    for start, end in ((0, 1), (1, 20), (20, 150)):
        state = torch.zeros(2, 8, 6)
        for t in range(start, end):
            state = decay[0, t].exp().unsqueeze(-1) * state + key[0, t].unsqueeze(-1) * value[0, t].unsqueeze(-2)
            expected = torch.einsum("nh,nhv->nv", query[0, t], state)
            torch.testing.assert_close(result[0, t], expected, rtol=1e-4, atol=1e-4)


def test_is_lightning_attention() -> None:
    torch.manual_seed(0)
    config = MiniMaxConfig(
        hidden_size=32, num_attention_heads=4, head_dim=8, num_hidden_layers=2, block_size=8, num_key_value_heads=4
    )
    module = MiniMaxLightningAttention(config, 0).eval()
    found: list[torch.Tensor] = []
    module.norm.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    hidden = torch.randn(1, 21, 32)
    with torch.no_grad():
        module(hidden, None, None)
        qkv = module.act_fn(module.qkv_proj(hidden)).view(1, 21, 4, 24)
        decay = -module.slope_rate.reshape(1, 1, 4, 1).expand(1, 21, 4, 1)
        result = linear_attention(*qkv.split(8, dim=-1), decay, None, None)
    torch.testing.assert_close(result.flatten(-2), found[0], rtol=1e-4, atol=1e-5)
