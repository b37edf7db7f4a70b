"""cached_attention over pages: against whole-sequence attention, every fact, odd sizes, long contexts, bad batches."""

import random
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from autodeploy.kernels.cpu.attention import cached_attention_cpu
from autodeploy.ops import cached_attention
from tests.kernels.paged_cases import FACTS, TOLERANCE, Case

FEW = 16
"""new tokens of a sequence up to which the native code takes them one by one (csrc/attention.cpp)"""


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("facts", FACTS, ids=str)
def test_every_fact(facts: dict[str, Any], dtype: torch.dtype) -> None:
    """Decode, a few tokens, a long chunk and a whole prompt, packed; contexts below, at and above a piece."""
    torch.manual_seed(0)
    Case([1, 127, 128, 129, 300, 40, 23], [1, 1, 1, 1, 3, 30, 23], dtype=dtype, **facts).check()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_sinks_and_logits_that_depend_on_the_token(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    arguments = Case([1, 129, 300, 40], [1, 1, 3, 30], dtype=dtype).arguments()
    own = {"sinks": torch.randn(1, 35, 4).to(dtype), "distance_logits": torch.randn(1, 35, 4, 9).to(dtype)}
    for facts in ({"sinks": own["sinks"]}, {"distance_logits": own["distance_logits"]}, own):
        given = arguments | facts
        assert cached_attention.kernels["cpu"].supports(**given) is None
        expected = cached_attention.reference(
            **{k: v.float() if isinstance(v, torch.Tensor) and v.dtype == dtype else v for k, v in given.items()}
        )
        result = cached_attention_cpu(**given).float()
        torch.testing.assert_close(result, expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def test_more_partial_results_than_are_kept_at_a_time() -> None:
    """370 queries of one to three pieces with 32 heads of 1000 values: 24 million partial results."""
    torch.manual_seed(0)
    Case([370], [370], heads=(32, 1), widths=(8, 1000), page_size=32, has_slopes=True).check()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("widths", [(16, 16), (64, 64), (80, 80), (128, 128), (256, 256), (24, 40), (7, 5), (192, 128)])
def test_head_sizes(widths: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    Case([140, 9], [1, 2], widths=widths, dtype=dtype).check()


@pytest.mark.parametrize("heads", [(1, 1), (2, 1), (3, 3), (5, 1), (6, 2), (7, 1), (8, 1), (9, 3), (9, 1), (33, 1)])
def test_head_counts(heads: tuple[int, int]) -> None:
    torch.manual_seed(0)
    Case([33, 5], [2, 1], heads=heads, has_sinks=True).check()


@settings(max_examples=40)
@given(st.data())
def test_any_batch(data: st.DataObject) -> None:
    torch.manual_seed(data.draw(st.integers(0, 99)))
    lengths = data.draw(st.lists(st.integers(1, 60), min_size=1, max_size=6))
    counts = [data.draw(st.integers(0, length)) for length in lengths]
    if sum(counts) == 0:
        counts[0] = 1
    facts = data.draw(st.sampled_from(FACTS))
    Case(lengths, counts, page_size=data.draw(st.sampled_from([1, 3, 16, 32])), **facts).check()


def test_a_decode_step_for_many_sequences() -> None:
    torch.manual_seed(0)
    lengths = [random.Random(1).randint(1, 300) for _ in range(40)]
    Case(lengths, [1] * 40, widths=(64, 64), heads=(9, 3), page_size=32).check()


def test_as_many_tokens_as_sequences_but_no_decode_step() -> None:
    torch.manual_seed(0)
    count = FEW + 4
    Case([count + 3, *[5] * (count - 1)], [count, *[0] * (count - 1)]).check()


def test_the_batch_does_not_change_a_sequence() -> None:
    """Bit for bit: the pieces a context is cut in depend on positions alone."""
    torch.manual_seed(0)
    both = Case([300, 150], [1, 2]).arguments()
    together = cached_attention_cpu(**both)
    rows = {name: both[name][:, 1:] for name in ("query", "key", "value")}
    alone = {
        "cu_seqlens": torch.tensor([0, 2], dtype=torch.int32),
        "seq_lens": both["seq_lens"][1:],
        "page_table": both["page_table"][1:],
        "slot_mapping": both["slot_mapping"][1:],
    }
    assert torch.equal(cached_attention_cpu(**(both | rows | alone)), together[:, 1:])


def test_only_the_new_slots_are_written() -> None:
    case = Case([20, 30], [1, FEW + 1])
    before = case.key_cache.clone(), case.value_cache.clone()
    arguments = case.arguments()
    cached_attention_cpu(**arguments)
    for cache, old, new in zip(
        (case.key_cache, case.value_cache), before, (arguments["key"], arguments["value"]), strict=True
    ):
        old.flatten(0, 1)[arguments["slot_mapping"]] = new[0]
        torch.testing.assert_close(cache, old, rtol=0, atol=0, equal_nan=True)


def test_a_nan_stays_in_its_own_sequence() -> None:
    case = Case([20, 30], [1, 1])
    case.rows[0][:] = float("nan")
    result = cached_attention_cpu(**case.arguments())
    assert result[:, 0].isnan().all()
    assert result[:, 1].isfinite().all()


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("slot_mapping", torch.tensor([10_000, 1]), "slot outside"),
        ("slot_mapping", torch.tensor([-1, 1]), "slot outside"),
        ("page_table", torch.full((2, 8), 10_000, dtype=torch.int32), "page outside"),
        ("page_table", torch.full((2, 8), -1, dtype=torch.int32), "page outside"),
        ("seq_lens", torch.tensor([20, 10_000], dtype=torch.int32), "do not fit"),
        ("seq_lens", torch.tensor([20, 0], dtype=torch.int32), "do not fit"),
        ("cu_seqlens", torch.tensor([0, 1, 9], dtype=torch.int32), "do not fit"),
        ("cu_seqlens", torch.tensor([0, 2], dtype=torch.int32), "do not fit"),
        ("seq_lens", torch.tensor([20], dtype=torch.int32), "do not fit"),
        ("slot_mapping", torch.tensor([1]), "do not fit"),
        ("cu_seqlens", torch.tensor([0, 2, 1], dtype=torch.int32), "do not fit"),
    ],
)
def test_a_batch_that_contradicts_itself_reads_nothing(name: str, value: torch.Tensor, reason: str) -> None:
    with pytest.raises(IndexError, match=reason):
        cached_attention_cpu(**(Case([20, 30], [1, 1]).arguments() | {name: value}))


@pytest.mark.parametrize("name", ["cu_seqlens", "seq_lens", "page_table", "slot_mapping"])
def test_batch_inputs_of_another_dtype_are_refused(name: str) -> None:
    arguments = Case([20], [1]).arguments()
    wrong = arguments[name].to(torch.int32 if name == "slot_mapping" else torch.int64)
    assert name in (cached_attention.kernels["cpu"].supports(**(arguments | {name: wrong})) or "")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("facts", FACTS, ids=str)
def test_long_chunks(facts: dict[str, Any], dtype: torch.dtype) -> None:
    """Whole prompts, later chunks and decode steps in one batch; sizes around blocks, tiles and work items."""
    torch.manual_seed(0)
    lengths, counts = [260, 129, 17, 300, 40], [260, 128, 17, 70, 1]
    Case(lengths, counts, widths=(32, 32), page_size=16, dtype=dtype, **facts).check()


def test_long_chunks_whose_weights_reach_from_one_to_zero() -> None:
    """The greatest score of a row rises from block to block, by more than what a weight can still tell."""
    torch.manual_seed(0)
    case = Case([300], [300], widths=(64, 64), scale=1.0)
    case.rows[0] *= torch.linspace(0.1, 3.0, 300).view(1, -1, 1)
    case.check(tolerance=2e-4)  # of scores up to 250, float32 itself is as far from the truth


@pytest.mark.parametrize("facts", [{}, {"sliding_window": 150}], ids=str)
def test_a_nan_in_a_long_chunk_stays_with_those_who_see_it(facts: dict[str, Any]) -> None:
    torch.manual_seed(0)
    case = Case([300], [300], **facts)
    case.rows[0][:, 150] = float("nan")
    result = cached_attention_cpu(**case.arguments())[0]
    assert result[:96].isfinite().all()  # a tile of queries sees whole tiles of keys: with AVX-512 positions 128 to 191
    assert result[150:].isnan().all()


@pytest.mark.parametrize("widths", [(5, 3), (16, 48), (64, 64), (80, 80), (128, 72), (256, 256)], ids=str)
@pytest.mark.parametrize("heads", [(1, 1), (9, 3), (7, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_long_chunks_of_odd_sizes(heads: tuple[int, int], widths: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    Case([130, 71], [67, 71], heads=heads, widths=widths, page_size=32, dtype=dtype).check()


@pytest.mark.parametrize("facts", [{"sliding_window": 40}, {"chunk_size": 100}], ids=str)
def test_long_chunks_do_not_read_what_the_window_has_left(facts: dict[str, Any]) -> None:
    torch.manual_seed(0)
    case = Case([250], [50], page_size=1, **facts)
    gone = case.slots[0][: 200 - 39 if "sliding_window" in facts else 200]
    case.key_cache.flatten(0, 1)[gone] = float("nan")
    case.value_cache.flatten(0, 1)[gone] = float("nan")
    case.check()


def test_long_chunks_do_not_depend_on_their_neighbours() -> None:
    torch.manual_seed(0)
    both = Case([300, 150], [40, 100], dtype=torch.bfloat16).arguments()
    together = cached_attention_cpu(**both)
    rows = {name: both[name][:, 40:] for name in ("query", "key", "value")}
    alone = {
        "cu_seqlens": torch.tensor([0, 100], dtype=torch.int32),
        "seq_lens": both["seq_lens"][1:],
        "page_table": both["page_table"][1:],
        "slot_mapping": both["slot_mapping"][40:],
    }
    assert torch.equal(cached_attention_cpu(**(both | rows | alone)), together[:, 40:])
