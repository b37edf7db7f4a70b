"""The greatest logit of a row, found by comparing bits as whole numbers, at the edges of what bits tell; and tokens
that are drawn, which are those of the reference.
"""

import math

import pytest
import torch

from autodeploy.kernels.cpu.native import why_unavailable
from autodeploy.kernels.cpu.sampling import choose_tokens_cpu
from autodeploy.ops.sampling import choose_tokens

pytestmark = pytest.mark.skipif(why_unavailable() is not None, reason="no native kernels here")

NAN, INF = math.nan, math.inf


def best(row: list[float] | torch.Tensor, dtype: torch.dtype) -> tuple[int, float]:
    tokens, values = choose_tokens_cpu(torch.as_tensor(row).to(dtype)[None], None, None, None, None, None, None)
    return int(tokens[0]), float(values[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_earliest_of_the_greatest_is_taken(dtype: torch.dtype) -> None:
    assert best([-2.0, -1.0, -1.0, -3.0], dtype) == (1, -1.0)
    assert best([-1.0, -0.0, 0.0, -2.0], dtype)[0] == 1, "0 is no greater than -0"
    assert best([-INF, -INF, -5.0, -INF], dtype) == (2, -5.0)
    assert best([-INF, -INF], dtype) == (0, -INF)
    assert best([1.0, INF, 2.0], dtype) == (1, INF)
    for width in (1, 511, 512, 513, 1537):
        row = torch.randn(width, generator=torch.Generator().manual_seed(width)).bfloat16().float()
        for at in {0, width // 2, width - 1}:
            changed = row.clone()
            changed[at] = 9.0
            assert best(changed, dtype) == (at, 9.0)
            zeros = torch.full((width,), -1.0)
            zeros[at], zeros[-1] = -0.0, 0.0
            assert best(zeros, dtype)[0] == at
        assert best(row, dtype)[0] == int(row.argmax())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_any_number_that_is_none_shows(dtype: torch.dtype) -> None:
    negative = -torch.tensor(NAN)
    assert torch.signbit(negative)
    for bad in (torch.tensor(NAN), negative):
        for at in (0, 300, 1023):
            row = torch.zeros(1024)
            row[at] = bad
            assert math.isnan(best(row, dtype)[1]), (bad, at)


def one_of(values: list[float], rows: int) -> torch.Tensor:
    return torch.tensor(values).repeat(rows)[:rows]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("spread", [0.1, 2.0, 10.0])
@pytest.mark.parametrize("width", [5, 1030])
def test_draws_what_the_reference_draws(dtype: torch.dtype, spread: float, width: int) -> None:
    """From flat rows and steep ones, with ties, forbidden tokens or no number above 0, by all filters together."""
    rows = 420
    logits = spread * torch.randn(rows, width, generator=torch.Generator().manual_seed(width))
    logits[1::3, 1::3] = -INF
    logits[2::3] = -3.0 - logits[2::3].abs()
    logits = logits.to(dtype)
    filters = {
        "top_k": one_of([0, 0, 1, 3, 300, 5000], rows).long(),
        "top_p": one_of([1.0, 0.9, 1.0, 0.5, 0.999], rows),
        "min_p": one_of([0.0, 0.0, 0.0, 0.03, 0.0, 0.0, 1e-6], rows),
    }
    draws = {
        "temperature": one_of([1.0, 0.3, 1.0, 4.0], rows),
        "keys": torch.arange(rows) * 7919,
        "positions": torch.arange(rows),
    }
    for given in (filters, dict.fromkeys(filters)):
        tokens, values = choose_tokens_cpu(logits, **draws, **given)
        expected_tokens, expected_values = choose_tokens.reference(logits, **draws, **given)
        assert torch.equal(tokens, expected_tokens)
        assert torch.equal(values, expected_values)
    assert len(tokens.unique()) > min(width, 40) // 2, "not drawn at random"
