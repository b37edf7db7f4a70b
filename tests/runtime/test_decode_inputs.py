"""Decode steps take another way to the same batches: each is compared with what the general way gives."""

import random
from typing import Any

import pytest
import torch

from autodeploy.runtime.batch import Batch, BatchBuilder
from autodeploy.runtime.decode_inputs import decode_tokens
from autodeploy.runtime.pages import PageGroup, StateAllocator
from autodeploy.runtime.request import Limits, Request, SamplingParams, Sequence

NAMES = ("input_ids", "position_ids", "cu_seqlens", "seq_lens", "logits_indices", "state_slots")
GROUPS = ("full", "window_5")
ALL = (*NAMES, *(kind + group for group in GROUPS for kind in ("page_table_", "slot_mapping_")))


def make_allocator() -> StateAllocator:
    groups = [PageGroup(name="full", num_pages=200), PageGroup(name="window_5", num_pages=200, window=5)]
    return StateAllocator(groups, num_slots=9, page_size=4, max_model_len=64)


def make_builder(allocator: StateAllocator) -> BatchBuilder:
    tables, sizes = allocator.page_tables, {"max_num_seqs": 8, "max_num_batched_tokens": 64}
    return BatchBuilder(ALL, page_tables=tables, page_size=4, device=torch.device("cpu"), **sizes)


def make_sequence(allocator: StateAllocator, num_tokens: int) -> Sequence:
    """One whose last token is to be computed next."""
    sequence = Sequence(Request("r", list(range(1, num_tokens + 1)), SamplingParams(), 0), 0, Limits(1000, 64))
    allocator.allocate(sequence, num_tokens)
    sequence.num_computed_tokens = num_tokens - 1
    return sequence


def as_lists(batch: Batch) -> dict[str, Any]:
    return {name: (tensor.dtype, tensor.tolist()) for name, tensor in batch.inputs.items()}


def test_a_decode_step_gives_what_the_general_way_gives() -> None:
    """Sequences come, go, grow over pages and leave windows behind; slots are used again by others."""
    source, allocator = random.Random(0), make_allocator()
    builder, running = make_builder(allocator), list[Sequence]()
    for step in range(120):
        if len(running) < 8 and source.random() < 0.3:
            running.append(make_sequence(allocator, source.randint(1, 20)))
        scheduled = dict.fromkeys(running, 1)
        if not scheduled:
            continue
        latest_R = None
        if step % 3 == 1:  # some tokens are still on the device
            latest_R = torch.arange(900, 908)
            for row, sequence in enumerate(running):
                sequence.token_ids.pop()
                sequence.pending_row = row
        assert decode_tokens(scheduled) is not None
        batch = builder.build(scheduled, latest_R)
        expected = make_builder(allocator)._general(scheduled, latest_R)
        assert as_lists(batch) == as_lists(expected), step
        assert batch.sampled == expected.sampled and batch.num_tokens == expected.num_tokens == len(running)
        assert batch.num_sampled_rows == expected.num_sampled_rows and not batch.has_drafts
        assert {name: value.tolist() for name, value in batch.on_host.items()} == {
            name: value.tolist() for name, value in expected.on_host.items()
        }
        for sequence in list(running):
            sequence.num_computed_tokens += 1
            if sequence.pending_row is not None:
                sequence.pending_row = None
                sequence.token_ids.append(source.randint(1, 999))
            sequence.token_ids.append(source.randint(1, 999))
            allocator.release_unreachable(sequence)
            allocator.allocate(sequence, 1)
            if len(sequence.token_ids) > 60 or source.random() < 0.03:
                allocator.free(sequence)
                running.remove(sequence)


def test_inputs_hold_until_the_build_after_the_next() -> None:
    allocator = make_allocator()
    builder, sequence = make_builder(allocator), make_sequence(allocator, 3)
    batches = []
    for _ in range(2):
        batches.append(builder.build({sequence: 1}))
        sequence.num_computed_tokens += 1
        sequence.token_ids.append(7)
        allocator.allocate(sequence, 1)
    assert [batch.inputs["position_ids"].tolist() for batch in batches] == [[[2]], [[3]]]
    assert [batch.inputs["input_ids"].tolist() for batch in batches] == [[[3]], [[7]]]


@pytest.mark.parametrize("kind", ["chunk", "two tokens", "drafts", "not its last"])
def test_other_steps_are_no_decode_steps(kind: str) -> None:
    allocator = make_allocator()
    first, other = make_sequence(allocator, 5), make_sequence(allocator, 6)
    assert decode_tokens({first: 1, other: 1}) == ([4, 5], [5, 6])
    count = 1
    if kind in ("chunk", "not its last"):
        other.num_computed_tokens = 2
        count = 3 if kind == "chunk" else 1
    elif kind == "two tokens":
        other.num_computed_tokens, count = 4, 2
    else:
        other.draft_token_ids, count = [8], 2
    assert decode_tokens({first: 1, other: count}) is None
