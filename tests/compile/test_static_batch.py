"""Static batches: what a graph reads is the batch and padding, whatever was there before."""

import torch

from autodeploy.compile.program import BatchLimits
from autodeploy.compile.static_batch import BatchSize, StaticBatch, StaticInput, dummy_batch

CPU = torch.device("cpu")
LIMITS = BatchLimits(max_num_seqs=4, max_num_batched_tokens=16, max_model_len=12, page_size=4)
DTYPES = {
    "input_ids": torch.int64,
    "position_ids": torch.int64,
    "cu_seqlens": torch.int32,
    "seq_lens": torch.int32,
    "logits_indices": torch.int64,
    "state_slots": torch.int32,
    "page_table_full": torch.int32,
    "slot_mapping_full": torch.int64,
}
INPUTS = [StaticInput.of(name, torch.empty(0, dtype=dtype)) for name, dtype in DTYPES.items()]
INPUTS.append(StaticInput.of("hidden_states", torch.empty(1, 1, 6)))


def decode_batch(count: int) -> dict[str, torch.Tensor]:
    numbers = torch.arange(1, count + 1)
    return {
        "input_ids": 10 * numbers[None],
        "position_ids": numbers[None] + 3,
        "cu_seqlens": torch.arange(count + 1, dtype=torch.int32),
        "seq_lens": numbers.int() + 4,
        "logits_indices": numbers - 1,
        "state_slots": numbers.int(),
        "page_table_full": numbers.int()[:, None].expand(-1, 2),
        "slot_mapping_full": 4 * numbers,
        "hidden_states": torch.ones(1, count, 6),
    }


def test_a_batch_is_followed_by_tokens_of_nobody() -> None:
    static = StaticBatch(INPUTS, BatchSize(4, 4), LIMITS, CPU)
    views = static.views(BatchSize(4, 4))
    assert views["page_table_full"].shape == (4, 3) and all(view.is_contiguous() for view in views.values())
    for count in (4, 2, 3, 1):
        batch = decode_batch(count)
        static.fill(batch)
        assert views["cu_seqlens"].tolist() == [0, 1, 2, 3, 4]
        for name in DTYPES.keys() - {"cu_seqlens", "page_table_full"}:
            padding = 1 if name == "seq_lens" else 0
            expected = [*batch[name].flatten().tolist(), *[padding] * (4 - count)]
            assert views[name].flatten().tolist() == expected, name
        assert views["page_table_full"][:, :2].tolist() == [[n, n] for n in range(1, count + 1)] + [[0, 0]] * (
            4 - count
        )
        assert views["hidden_states"].sum() == 6 * count


def test_smaller_sizes_are_the_beginning_of_the_same_memory() -> None:
    static = StaticBatch(INPUTS, BatchSize(4, 4), LIMITS, CPU)
    for name, view in static.views(BatchSize(2, 2)).items():
        whole = static.views(BatchSize(4, 4))[name]
        assert view.data_ptr() == whole.data_ptr()
        assert view.shape == tuple({4: 2, 5: 3}.get(n, n) if n != 6 else n for n in whole.shape)


def test_only_token_wise_inputs_are_by_token() -> None:
    by_token = {given.name for given in INPUTS if given.is_by_token}
    assert by_token == {"input_ids", "position_ids", "slot_mapping_full", "hidden_states"}


def test_a_trial_touches_nothing_but_scratch() -> None:
    batch = dummy_batch(INPUTS, [3, 2], LIMITS, 4, CPU)
    assert batch["input_ids"].tolist() == [[0, 1, 2, 3, 0]]
    assert batch["cu_seqlens"].tolist() == [0, 3, 5] and batch["seq_lens"].tolist() == [12, 12]
    assert batch["position_ids"].tolist() == [[9, 10, 11, 10, 11]]
    assert batch["logits_indices"].tolist() == [2, 4]
    assert not any(batch[name].any() for name in ("state_slots", "page_table_full", "slot_mapping_full"))
    assert {given.name: batch[given.name].dtype for given in INPUTS} == DTYPES | {"hidden_states": torch.float32}
