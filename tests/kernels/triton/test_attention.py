"""cached_attention over pages in Triton, where samples are too small: many pages, splits, long chunks, odd batches."""

from typing import Any

import pytest
import torch

from autodeploy.kernels import provider
from autodeploy.ops import cached_attention
from tests.kernels.paged_cases import FACTS, TOLERANCE, Case

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
IS_INTERPRETED = not provider.unavailable(CUDA) and not torch.cuda.is_available()

pytestmark = pytest.mark.skipif(not IS_INTERPRETED, reason="runs in Triton's interpreter, on CPU tensors")


def attend(**arguments: Any) -> torch.Tensor:
    result: torch.Tensor = cached_attention.kernels["triton"].function(**arguments)
    return result


@pytest.mark.parametrize("facts", FACTS, ids=str)
def test_contexts_in_splits(facts: dict[str, Any]) -> None:
    """Two sequences decode; the context of one ends within its first split."""
    from autodeploy.kernels.triton import paged

    torch.manual_seed(0)
    assert paged.num_splits(2, 1088, CPU) == 8
    Case([1030, 3], [1, 1], heads=(6, 1), page_size=32, **facts).check("triton")


@pytest.mark.parametrize("facts", FACTS, ids=str)
def test_long_chunks(facts: dict[str, Any]) -> None:
    """A whole prompt, a later chunk and a sequence without new tokens; pages are no power of two."""
    torch.manual_seed(0)
    Case([70, 150, 9], [70, 33, 0], heads=(6, 2), page_size=3, **facts).check("triton")


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("widths", [(7, 5), (80, 80), (24, 40)], ids=str)
def test_head_sizes(widths: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    Case([140, 9], [1, 2], widths=widths, dtype=dtype).check("triton")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("counts", [[1, 1, 1], [21, 33, 0]], ids=str)
def test_keys_and_values_in_8_bits(dtype: torch.dtype, counts: list[int]) -> None:
    """What is written to pages, and what is made of it, are the reference's, numbers beyond the largest included."""
    torch.manual_seed(0)
    given = Case([21, 150, 9], counts, heads=(6, 2)).arguments()
    given["key"] = given["key"].clone().contiguous()
    given["key"][0, 0, 0, :2] = torch.tensor([1e6, -1e-9])
    for name in ("key_cache", "value_cache"):
        given[name] = given[name].nan_to_num().to(dtype)
    again = given | {name: given[name].clone() for name in ("key_cache", "value_cache")}
    assert cached_attention.kernels["triton"].supports(**given) is None
    torch.testing.assert_close(attend(**given), cached_attention.reference(**again), rtol=2e-5, atol=2e-5)
    for name in ("key_cache", "value_cache"):
        assert torch.equal(given[name].float(), again[name].float())


@pytest.mark.parametrize("heads", [(1, 1), (5, 1), (7, 1), (33, 1)], ids=str)
def test_head_counts(heads: tuple[int, int]) -> None:
    torch.manual_seed(0)
    Case([33, 5], [2, 1], heads=heads, has_sinks=True).check("triton")


def test_as_many_tokens_as_sequences_but_no_decode_step() -> None:
    torch.manual_seed(0)
    Case([24, *[5] * 19], [20, *[0] * 19], heads=(1, 1)).check("triton")


def test_more_sequences_than_are_searched_at_once() -> None:
    torch.manual_seed(0)
    Case([5] * 140, [0] * 127 + [1, 2] + [0] * 9 + [3, 1], heads=(1, 1)).check("triton")


def test_padding_changes_nothing() -> None:
    """A batch filled up to a bucket: sequences of one token each, all in the scratch page."""
    torch.manual_seed(0)
    arguments = Case([40, 9], [1, 1]).arguments()
    expected = attend(**{k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in arguments.items()})
    filled: dict[str, Any] = dict(arguments)
    for name in ("query", "key", "value"):
        filled[name] = torch.cat([arguments[name], torch.randn_like(arguments[name])], dim=1)
    filled["cu_seqlens"] = torch.arange(5, dtype=torch.int32)
    filled["seq_lens"] = torch.tensor([40, 9, 1, 1], dtype=torch.int32)
    filled["page_table"] = torch.cat([arguments["page_table"], torch.zeros_like(arguments["page_table"])])
    filled["slot_mapping"] = torch.cat([arguments["slot_mapping"], torch.zeros(2, dtype=torch.int64)])
    result = attend(**filled)
    assert result.isfinite().all()
    torch.testing.assert_close(result[:, :2], expected, rtol=0, atol=0)


@pytest.mark.parametrize("facts", [{"sliding_window": 40}, {"chunk_size": 100}], ids=str)
def test_does_not_read_what_the_window_has_left(facts: dict[str, Any]) -> None:
    torch.manual_seed(0)
    case = Case([250], [50], page_size=1, **facts)
    gone = case.slots[0][: 200 - 39 if "sliding_window" in facts else 200]
    case.key_cache.flatten(0, 1)[gone] = float("nan")
    case.value_cache.flatten(0, 1)[gone] = float("nan")
    case.check("triton")


def test_only_the_new_slots_are_written() -> None:
    case = Case([20, 30], [1, 17])
    before = case.key_cache.clone(), case.value_cache.clone()
    arguments = case.arguments()
    attend(**arguments)
    for cache, old, name in zip((case.key_cache, case.value_cache), before, ("key", "value"), strict=True):
        old.flatten(0, 1)[arguments["slot_mapping"]] = arguments[name][0]
        torch.testing.assert_close(cache, old, rtol=0, atol=0, equal_nan=True)


def test_refuses_what_does_not_fit() -> None:
    supports = cached_attention.kernels["triton"].supports
    assert supports(**Case([2], [1], widths=(256, 256)).arguments()) is None
    assert "up to 1024 bytes" in (supports(**Case([2], [1], widths=(257, 16)).arguments()) or "")
    assert "129 query heads" in (supports(**Case([2], [1], heads=(129, 1)).arguments()) or "")
    arguments = Case([2], [1]).arguments()
    gaps = {"key_cache": torch.cat([arguments["key_cache"]] * 2, dim=3)[..., :16]}
    assert "gaps" in (supports(**(arguments | gaps)) or "")
