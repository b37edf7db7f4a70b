"""cached_rope_attention in Triton gives the bits of `rope` and `cached_attention` after each other, pages too."""

from typing import Any

import pytest
import torch
from torch import Tensor

from autodeploy.kernels import provider
from autodeploy.ops import cached_attention, cached_rope_attention, rope
from tests.kernels.paged_cases import Case

CUDA = torch.device("cuda")
IS_INTERPRETED = not provider.unavailable(CUDA) and not torch.cuda.is_available()

pytestmark = pytest.mark.skipif(not IS_INTERPRETED, reason="runs in Triton's interpreter, on CPU tensors")


def arguments(rotary_dim: int, cache_dtype: torch.dtype | None = None, **case: Any) -> dict[str, Any]:
    """Two sequences, one in a chunk and one that decodes, with angles for their new tokens."""
    torch.manual_seed(0)
    given = Case([21, 9], [5, 1], **case).arguments()
    angle = torch.randn(1, 6, rotary_dim // 2).repeat(1, 1, 2)
    for name in ("key_cache", "value_cache"):
        given[name] = given[name].nan_to_num().to(cache_dtype or given[name].dtype)
    return given | {"cos": angle.cos().to(given["query"].dtype), "sin": angle.sin().to(given["query"].dtype)}


def one_after_the_other(cos: Tensor, sin: Tensor, **given: Any) -> Tensor:
    query, key = rope.kernels["triton"].function(given["query"], given["key"], cos, sin)
    result: Tensor = cached_attention.kernels["triton"].function(**given | {"query": query, "key": key})
    return result


def check(given: dict[str, Any]) -> None:
    again = given | {name: given[name].clone() for name in ("key_cache", "value_cache")}
    kernel = cached_rope_attention.kernels["triton"]
    assert kernel.supports(**given) is None
    torch.testing.assert_close(kernel.function(**given), one_after_the_other(**again), rtol=0, atol=0)
    for name in ("key_cache", "value_cache"):
        assert torch.equal(given[name].float(), again[name].float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rotary_dim", [16, 6])
def test_whole_and_partial_turning(rotary_dim: int, dtype: torch.dtype) -> None:
    check(arguments(rotary_dim, dtype=dtype))


@pytest.mark.parametrize(
    ("heads", "widths", "rotary_dim"),
    [((12, 3), (80, 80), 80), ((5, 5), (256, 24), 64), ((1, 1), (8, 8), 2)],
    ids=["queries in two blocks", "keys in two blocks", "one head"],
)
def test_head_counts_and_sizes(heads: tuple[int, int], widths: tuple[int, int], rotary_dim: int) -> None:
    check(arguments(rotary_dim, heads=heads, widths=widths))


@pytest.mark.parametrize("cache_dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_pages_in_8_bits(cache_dtype: torch.dtype) -> None:
    """Keys are rounded as often as when they are turned first; what is too large becomes the largest number."""
    given = arguments(8, cache_dtype, dtype=torch.bfloat16)
    given["key"] = given["key"].clone()
    given["key"][0, 0, 0, :2] = torch.tensor([1e6, -1e6])
    given["key"][0, 0, 0, -1] = 1e6
    check(given)


def test_turned_keys_are_in_the_new_slots_alone() -> None:
    given = arguments(16)
    before = given["key_cache"].clone()
    cached_rope_attention.kernels["triton"].function(**given)
    _, key = rope.reference(given["query"], given["key"], given["cos"], given["sin"])
    before.flatten(0, 1)[given["slot_mapping"]] = key[0]
    torch.testing.assert_close(given["key_cache"], before, rtol=1e-5, atol=1e-5)


def test_layouts_that_are_copied_first() -> None:
    given = arguments(16)
    for name in ("query", "key", "value", "cos", "sin"):
        given[name] = given[name].transpose(-1, -2).contiguous().transpose(-1, -2)
    check(given)


def test_refuses_what_either_op_refuses() -> None:
    supports, given = cached_rope_attention.kernels["triton"].supports, arguments(16)
    odd = {name: given[name][..., :5] for name in ("cos", "sin")}
    assert "5 rotary dimensions" in (supports(**given | odd) or "")
    assert "mixed dtypes" in (supports(**given | {"cos": given["cos"].bfloat16()}) or "")
    assert "129 query heads" in (supports(**arguments(16, heads=(129, 1))) or "")
