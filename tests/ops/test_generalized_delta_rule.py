"""generalized_delta_rule against the formula, token by token, and as the plain delta rule with a decay."""

import torch
import torch.nn.functional as F

from autodeploy.ops import delta_rule, generalized_delta_rule


def test_is_the_recurrence_of_each_sequence() -> None:
    query, key, value = torch.randn(1, 60, 2, 8), torch.randn(1, 60, 2, 8), torch.randn(1, 60, 2, 6)
    read, write = F.normalize(torch.randn(1, 60, 2, 8), dim=-1), 0.3 * torch.randn(1, 60, 2, 8)
    decay = -3 * torch.rand(1, 60, 2, 8)
    borders = torch.tensor([0, 1, 20, 60], dtype=torch.int32)
    result = generalized_delta_rule(query, key, value, read, write, decay, borders)
    for start, end in ((0, 1), (1, 20), (20, 60)):
        state = torch.zeros(2, 8, 6)
        for t in range(start, end):
            found = torch.einsum("nh,nhv->nv", read[0, t], state)
            state = decay[0, t].exp().unsqueeze(-1) * state + write[0, t].unsqueeze(-1) * found.unsqueeze(-2)
            state = state + key[0, t].unsqueeze(-1) * value[0, t].unsqueeze(-2)
            expected = torch.einsum("nh,nhv->nv", query[0, t], state)
            torch.testing.assert_close(result[0, t], expected, rtol=1e-4, atol=1e-4)


def test_the_delta_rule_is_a_case_of_it() -> None:
    query, value = torch.randn(1, 40, 2, 8), torch.randn(1, 40, 2, 6)
    key, beta = F.normalize(torch.randn(1, 40, 2, 8), dim=-1), torch.rand(1, 40, 2)
    decay = -torch.rand(1, 40, 2, 8)
    expected = delta_rule(query, key, value, beta, decay, 1.0, None, None)
    strength = beta.unsqueeze(-1)
    result = generalized_delta_rule(query, key, value * strength, key * decay.exp(), -strength * key, decay, None)
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)
