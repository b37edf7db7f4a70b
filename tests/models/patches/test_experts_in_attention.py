"""The patched functions give what the originals give, and leave the class as it was."""

import torch
from transformers import JetMoeConfig
from transformers.models.jetmoe.modeling_jetmoe import JetMoeMoA

from autodeploy.models.patches.experts_in_attention import patch


@torch.no_grad()
def test_patched_equals_original_and_is_undone() -> None:
    torch.manual_seed(0)
    experts = JetMoeMoA(JetMoeConfig(hidden_size=24, kv_channels=8, num_key_value_heads=2, num_local_experts=5))
    for parameter in experts.parameters():
        parameter.copy_(torch.randn(parameter.shape) * 0.3)
    x, methods = torch.randn(1, 9, 24), (JetMoeMoA.map, JetMoeMoA.reduce)
    queries, logits, topology = experts.map(x)
    result = experts.reduce(queries.tanh(), topology)
    with patch():
        mine, my_logits, routing = experts.map(x)
        torch.testing.assert_close((mine, my_logits), (queries, logits))
        torch.testing.assert_close(experts.reduce(queries.tanh(), routing), result)
        assert (JetMoeMoA.map, JetMoeMoA.reduce) != methods
    assert (JetMoeMoA.map, JetMoeMoA.reduce) == methods
