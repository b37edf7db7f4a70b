"""The packed row of a mixed step, input by input, against one written out by hand."""

import numpy as np
import pytest
import torch

from autodeploy.errors import UnsupportedModelError
from autodeploy.ops.batch_inputs import BATCH_INPUTS, lookup
from autodeploy.runtime.batch import Batch, BatchBuilder
from autodeploy.runtime.pages import PageGroup, StateAllocator
from autodeploy.runtime.request import Limits, Request, SamplingParams, Sequence

NAMES = tuple(
    name.replace("{group}", group) for name in BATCH_INPUTS for group in ("full", "window_3")[: 1 + name.count("{")]
)


def make_allocator() -> StateAllocator:
    groups = [PageGroup(name="full", num_pages=30), PageGroup(name="window_3", num_pages=30, window=3)]
    return StateAllocator(groups, num_slots=5, page_size=4, max_model_len=32)


def make_builder(allocator: StateAllocator, names: tuple[str, ...] = NAMES) -> BatchBuilder:
    return BatchBuilder(
        names,
        page_tables=allocator.page_tables,
        page_size=4,
        max_num_seqs=4,
        max_num_batched_tokens=32,
        device=torch.device("cpu"),
    )


def make_sequence(allocator: StateAllocator, token_ids: list[int], *, computed: int, count: int) -> Sequence:
    sequence = Sequence(Request("r", token_ids, SamplingParams(), 0), 0, Limits(1000, 32))
    if computed:
        assert allocator.allocate(sequence, computed) == computed
        sequence.num_computed_tokens = computed
        allocator.release_unreachable(sequence)
    assert allocator.allocate(sequence, count) == count
    return sequence


def as_lists(batch: Batch) -> dict[str, object]:
    return {name: tensor.tolist() for name, tensor in batch.inputs.items()}


def test_a_mixed_step_written_out_by_hand() -> None:
    allocator = make_allocator()
    decode = make_sequence(
        allocator, [10, 11, 12, 13, 14, 15, 16], computed=6, count=1
    )  # full 1 2, window 1 2 (1 freed)
    chunk = make_sequence(allocator, list(range(20, 32)), computed=4, count=5)  # more of its prompt is to come
    whole = make_sequence(allocator, [40, 41], computed=0, count=2)
    batch = make_builder(allocator).build({decode: 1, chunk: 5, whole: 2})
    assert batch.sampled == [decode, whole] and batch.num_tokens == 8
    tables = allocator.page_tables
    full, window = tables["full"], tables["window_3"]
    assert as_lists(batch) == {
        "input_ids": [[16, 24, 25, 26, 27, 28, 40, 41]],
        "position_ids": [[6, 4, 5, 6, 7, 8, 0, 1]],
        "cu_seqlens": [0, 1, 6, 8],
        "seq_lens": [7, 9, 2],
        "logits_indices": [0, 7],
        "state_slots": [1, 2, 3],
        "page_table_full": [[1, 2, 0], [3, 4, 5], [6, 0, 0]],
        "page_table_window_3": window[1:4, :3].tolist(),
        "slot_mapping_full": [2 * 4 + 2, 16, 17, 18, 19, 20, 24, 25],
        "slot_mapping_window_3": [
            int(window[slot, position // 4]) * 4 + position % 4
            for slot, position in ((1, 6), (2, 4), (2, 5), (2, 6), (2, 7), (2, 8), (3, 0), (3, 1))
        ],
    }
    assert window[1, 0] == 0 and full[1, 0] == 1, "the window group gave its first page back"


def test_drafts_follow_the_last_token_and_each_has_a_row_of_logits() -> None:
    allocator = make_allocator()
    first = make_sequence(allocator, [10, 11, 12], computed=2, count=4)
    chunk = make_sequence(allocator, list(range(20, 32)), computed=0, count=2)
    last = make_sequence(allocator, [40, 41], computed=1, count=1)
    first.draft_token_ids = [70, 71, 72]
    batch = make_builder(allocator).build({first: 4, chunk: 2, last: 1})
    assert batch.sampled == [first, last] and batch.num_sampled_rows == 5
    inputs = as_lists(batch)
    assert inputs["input_ids"] == [[12, 70, 71, 72, 20, 21, 41]]
    assert inputs["position_ids"] == [[2, 3, 4, 5, 0, 1, 1]]
    assert inputs["logits_indices"] == [0, 1, 2, 3, 6] and inputs["seq_lens"] == [6, 2, 2]


def test_names_shapes_dtypes_and_layout_are_as_declared() -> None:
    allocator = make_allocator()
    sequences = [make_sequence(allocator, [1] * n, computed=0, count=n) for n in (3, 9)]
    batch = make_builder(allocator).build({sequences[0]: 3, sequences[1]: 9})
    sizes = {"T": 12, "S": 2, "S+1": 3, "R": 2, "P": 3, 1: 1}
    assert tuple(batch.inputs) == NAMES
    for name, tensor in batch.inputs.items():
        declared = lookup(name)
        assert declared is not None
        assert tensor.dtype == declared.dtype and tensor.shape == tuple(sizes[dim] for dim in declared.dims), name
        assert tensor.is_contiguous(), name


def test_what_steps_are_planned_from_is_at_hand_on_the_host() -> None:
    allocator = make_allocator()
    sequence = make_sequence(allocator, list(range(9)), computed=4, count=5)
    batch = make_builder(allocator).build({sequence: 5})
    assert batch.on_host.keys() == {"cu_seqlens", "seq_lens", "page_table_full", "page_table_window_3"}
    assert all(value.tolist() == batch.inputs[name].tolist() for name, value in batch.on_host.items())


def test_decode_only_and_prefill_only_steps() -> None:
    allocator = make_allocator()
    decodes = [make_sequence(allocator, [n] * 6, computed=5, count=1) for n in (7, 8)]
    batch = make_builder(allocator).build(dict.fromkeys(decodes, 1))
    assert batch.inputs["input_ids"].tolist() == [[7, 8]] and batch.inputs["position_ids"].tolist() == [[5, 5]]
    assert batch.inputs["logits_indices"].tolist() == [0, 1] and batch.sampled == decodes
    chunk = make_sequence(allocator, [9] * 6, computed=0, count=5)
    batch = make_builder(allocator).build({chunk: 5})
    assert batch.sampled == [] and batch.inputs["logits_indices"].tolist() == [0], "never zero rows"


def test_a_later_build_leaves_earlier_inputs_alone() -> None:
    allocator = make_allocator()
    first, second = (make_sequence(allocator, [n] * 4, computed=0, count=4) for n in (1, 2))
    builder = make_builder(allocator)
    batch = builder.build({first: 4})
    before = as_lists(batch)
    builder.build({second: 4})
    allocator.free(first)
    assert as_lists(batch) == before
    assert not np.shares_memory(batch.inputs["page_table_full"].numpy(), allocator.page_tables["full"])


@pytest.mark.parametrize("name", ["no_such_input", "page_table_window_9", "slot_mapping_slots", "page_table_"])
def test_an_input_that_cannot_be_provided_is_refused(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"'{name}'.*full, window_3"):
        make_builder(make_allocator(), ("input_ids", name))


def test_tokens_that_are_being_sampled_are_filled_in_on_the_device() -> None:
    allocator = make_allocator()
    decode = make_sequence(allocator, [10, 11, 12], computed=3, count=1)
    decode.pending_row = 2
    chunk = make_sequence(allocator, [20, 21], computed=0, count=2)
    batch = make_builder(allocator).build({decode: 1, chunk: 2}, torch.tensor([7, 8, 9]))
    lists = as_lists(batch)
    assert (lists["input_ids"], lists["position_ids"]) == ([[9, 20, 21]], [[3, 0, 1]])
    assert (lists["seq_lens"], batch.sampled) == ([4, 2], [decode, chunk])
    nothing_sampled = torch.zeros(0, dtype=torch.int64)
    assert make_builder(allocator).build({chunk: 2}, nothing_sampled).inputs["input_ids"].tolist() == [[20, 21]]
