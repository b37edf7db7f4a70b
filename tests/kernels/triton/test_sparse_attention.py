"""cached_sparse_attention in Triton where samples are too small: lists in splits, equal scores, scores in parts."""

import itertools
from typing import Any

import pytest
import torch

from autodeploy.kernels import provider
from autodeploy.ops.sparse_attention import cached_sparse_attention, sparse_attention

CUDA = torch.device("cuda")
IS_INTERPRETED = not provider.unavailable(CUDA) and not torch.cuda.is_available()
PAGE_SIZE = 4

pytestmark = pytest.mark.skipif(not IS_INTERPRETED, reason="runs in Triton's interpreter, on CPU tensors")


def _arguments(sample: dict[str, Any], lengths: list[int], counts: list[int]) -> dict[str, Any]:
    """Sequences whose last `counts` tokens are new, their pages shuffled."""
    width = max(-(-length // PAGE_SIZE) for length in lengths) + 1
    table = (torch.randperm(len(lengths) * width) + 1).view(-1, width).int()
    slots = [
        int(table[index, position // PAGE_SIZE]) * PAGE_SIZE + position % PAGE_SIZE
        for index, (length, count) in enumerate(zip(lengths, counts, strict=True))
        for position in range(length - count, length)
    ]
    given = dict(sample)
    for name in ("query", "key", "value", "index_query", "index_key", "index_weights"):
        if given[name] is not None:
            given[name] = torch.randn(1, len(slots), *given[name].shape[2:])
    for name in ("key", "value", "index_key"):
        given[f"{name}_cache"] = torch.randn(len(lengths) * width + 1, PAGE_SIZE, *given[name].shape[2:])
    return given | {
        "cu_seqlens": torch.tensor([0, *itertools.accumulate(counts)], dtype=torch.int32),
        "seq_lens": torch.tensor(lengths, dtype=torch.int32),
        "page_table": table,
        "slot_mapping": torch.tensor(slots),
    }


def _check(given: dict[str, Any]) -> None:
    copied = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in given.items()}
    expected = cached_sparse_attention.reference(**given)
    kernel = cached_sparse_attention.kernels["triton"]
    assert kernel.supports(**copied) is None
    torch.testing.assert_close(kernel.function(**copied), expected, rtol=2e-5, atol=2e-5)
    for name in cached_sparse_attention.mutates:
        assert torch.equal(copied[name], given[name])


@pytest.mark.parametrize("number", range(4))
def test_old_and_new_tokens(number: int) -> None:
    torch.manual_seed(number)
    assert sparse_attention.samples is not None
    _check(_arguments(sparse_attention.samples()[number], [9, 40, 17, 1], [3, 1, 0, 1]))


def test_lists_in_splits_and_scores_in_several_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    from autodeploy.kernels.triton import sparse_attention as module

    monkeypatch.setattr(module, "_MOST_SCORES", 400)
    torch.manual_seed(0)
    assert sparse_attention.samples is not None
    given = _arguments(sparse_attention.samples()[1] | {"top_k": 260}, [300, 5], [1, 1])
    assert module.num_splits(2 * 2, 512, torch.device("cpu")) > 1
    _check(given)


def test_of_equal_scores_the_earliest_are_chosen() -> None:
    """Scores are whole numbers, many of them equal, some below zero and some nothing."""
    torch.manual_seed(0)
    assert sparse_attention.samples is not None
    for sample in sparse_attention.samples()[:3:2]:
        given = _arguments(sample, [61, 23], [1, 23])
        for name in ("index_query", "index_key", "index_key_cache", "index_weights"):
            if given[name] is not None:
                given[name] = torch.randint(-1, 2, given[name].shape).float()
        _check(given)
