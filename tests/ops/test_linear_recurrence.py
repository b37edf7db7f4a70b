"""linear_recurrence against the scan of transformers' RG-LRU."""

import torch
from transformers import RecurrentGemmaConfig
from transformers.models.recurrent_gemma.modeling_recurrent_gemma import RecurrentGemmaRglru

from autodeploy.ops import linear_recurrence


def test_is_the_scan_of_each_sequence() -> None:
    scan = RecurrentGemmaRglru(RecurrentGemmaConfig(lru_width=16, num_attention_heads=2))._rnn_scan
    x, gate = torch.randn(1, 77, 16), torch.rand(1, 77, 16)
    gate[:, 30] = 0.0
    result = linear_recurrence(x, gate, torch.tensor([0, 1, 20, 77], dtype=torch.int32))
    never = torch.zeros(1, 77, 1, dtype=torch.bool)
    zeros = torch.zeros(1, 16)
    expected = [scan(x[:, a:b], gate[:, a:b], never[:, a:b], zeros)[0] for a, b in ((0, 1), (1, 20), (20, 77))]
    torch.testing.assert_close(result, torch.cat(expected, dim=1), rtol=1e-5, atol=1e-5)
