"""mlstm against transformers' own step by step recurrence, over chunks and with gates that reach far."""

import pytest
import torch
from transformers.models.xlstm.modeling_xlstm import mlstm_recurrent_sequence_native

from autodeploy.ops import mlstm


@pytest.mark.parametrize(("strength", "eps"), [(1.0, 1e-6), (12.0, 1e-3)])
def test_is_the_recurrence_of_each_sequence(strength: float, eps: float) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 150, 2, 8, generator=generator) for _ in range(2))
    value = torch.randn(1, 150, 2, 6, generator=generator)
    gates = [strength * torch.randn(1, 150, 2, generator=generator) for _ in range(2)]
    borders = torch.tensor([0, 1, 20, 150], dtype=torch.int32)
    result = mlstm(query, key, value, *gates, 8**-0.5, eps, borders)
    for start, end in ((0, 1), (1, 20), (20, 150)):
        q, k, v, i, f = (part[:, start:end].transpose(1, 2) for part in (query, key, value, *gates))
        expected = mlstm_recurrent_sequence_native(q, k, v, i, f, eps=eps)
        torch.testing.assert_close(result[:, start:end].transpose(1, 2), expected, rtol=1e-4, atol=1e-5)
