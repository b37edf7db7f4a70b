"""Sizes of graphs: every batch within the limits finds one that is not much larger."""

import pytest

from autodeploy.compile.capture_sizes import CaptureSizes
from autodeploy.compile.program import BatchLimits


def limits(max_num_seqs: int, max_num_batched_tokens: int = 2048, max_model_len: int = 4096) -> BatchLimits:
    return BatchLimits(
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        max_model_len=max_model_len,
        page_size=32,
    )


def test_sizes_are_those_that_users_know_largest_first() -> None:
    sizes = CaptureSizes.of(None, limits(20), has_whole_steps=True)
    assert sizes.sequences == (20, 16, 8, 4, 2, 1)
    assert sizes.tokens == (512, 384, 256, 192, 128, 96, 64, 48, 32, 24, 16, 8)
    assert CaptureSizes.of(None, limits(1), has_whole_steps=True).sequences == (1,)
    assert CaptureSizes.of(None, limits(20), has_whole_steps=False).sequences == ()
    assert CaptureSizes.of(None, limits(20), has_whole_steps=False).tokens[-4:] == (8, 4, 2, 1)


@pytest.mark.parametrize("max_num_seqs", [1, 3, 64, 200])
def test_every_batch_is_padded_to_the_next_size(max_num_seqs: int) -> None:
    sizes = CaptureSizes.of(None, limits(max_num_seqs), has_whole_steps=True)
    for count in range(1, max_num_seqs + 1):
        size = sizes.of_sequences(count)
        assert size is not None and count <= size < count + 8
    assert sizes.of_sequences(max_num_seqs + 1) is None
    for count in range(9, sizes.most_tokens + 1):
        size = sizes.of_tokens(count)
        assert size is not None and count <= size <= 1.5 * count + 8
    assert sizes.of_tokens(sizes.most_tokens + 1) is None


def test_no_size_is_larger_than_a_step_can_be() -> None:
    assert CaptureSizes.of(None, limits(64, max_num_batched_tokens=100), has_whole_steps=True).most_tokens == 100
    assert CaptureSizes.of(None, limits(2, max_model_len=50), has_whole_steps=True).most_tokens == 100
    given = CaptureSizes.of([8, 2, 600, 2], limits(4), has_whole_steps=True)
    assert (given.sequences, given.tokens) == ((2,), (600, 8, 2))
