"""cached_mla over pages in Triton, where samples are too small: splits, long chunks, many heads."""

from typing import Any

import pytest
import torch

from autodeploy.kernels import provider
from autodeploy.ops import cached_mla
from tests.kernels.paged_cases import mla_arguments

CUDA = torch.device("cuda")
IS_INTERPRETED = not provider.unavailable(CUDA) and not torch.cuda.is_available()

pytestmark = pytest.mark.skipif(not IS_INTERPRETED, reason="runs in Triton's interpreter, on CPU tensors")


def check(given: dict[str, Any]) -> None:
    kernel = cached_mla.kernels["triton"]
    assert kernel.supports(**given) is None
    again = given | {"latent_cache": given["latent_cache"].clone()}
    expected = cached_mla.reference(**again)
    torch.testing.assert_close(kernel.function(**given), expected, rtol=5e-5, atol=5e-5)
    assert torch.equal(given["latent_cache"], again["latent_cache"])


def test_contexts_in_splits() -> None:
    torch.manual_seed(0)
    check(mla_arguments([530, 3], [1, 1], page_size=16))


def test_chunks_and_sequences_without_new_tokens() -> None:
    torch.manual_seed(0)
    check(mla_arguments([60, 7, 130, 9], [50, 0, 3, 1]))


def test_latents_in_8_bits() -> None:
    torch.manual_seed(0)
    given = mla_arguments([60, 7, 13, 9], [50, 0, 3, 1])
    given["latent_cache"] = given["latent_cache"].nan_to_num().to(torch.float8_e4m3fn)
    check(given)


@pytest.mark.parametrize("heads", [3, 70])
def test_head_counts(heads: int) -> None:
    torch.manual_seed(0)
    check(mla_arguments([40, 9], [3, 1], heads=heads, widths=(5, 4, 9, 7)))


def test_refuses_what_does_not_fit() -> None:
    wide = mla_arguments([2], [1], widths=(16, 8, 257, 12))
    assert "up to 1024 bytes" in (cached_mla.kernels["triton"].supports(**wide) or "")
