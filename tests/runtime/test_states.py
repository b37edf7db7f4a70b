"""Plans stay within the budget, serve what they promise, and say what is missing when they cannot."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from autodeploy.config import EngineOptions
from autodeploy.errors import OutOfMemoryError
from autodeploy.ops.state import PagedState, SlotState, StateSpec
from autodeploy.runtime.states import (
    MIN_MODEL_LEN,
    UNLIMITED_MODEL_LEN,
    StatePlan,
    allocate_states,
    copy_slot,
    plan_states,
)

CPU = torch.device("cpu")
FULL = [PagedState(name=name, shape=(2, 8), dtype=torch.float32) for name in ("key", "value")]  # 128 bytes per token
WINDOW = PagedState(name="near", shape=(4,), dtype=torch.float16, window=64)  # 8 bytes per token
SLOT = SlotState(name="running", shape=(3, 5), dtype=torch.float32)  # 60 bytes


def plan(
    specs: list[StateSpec],
    budget: int | None,
    *,
    max_len: int | None = None,
    limit: int | None = 4096,
    caches: bool = True,
) -> StatePlan:
    options = EngineOptions(
        page_size=16,
        max_num_seqs=8,
        max_num_batched_tokens=256,
        kv_cache_memory_bytes=budget,
        enable_prefix_caching=caches,
    )
    return plan_states(specs, options, device=CPU, max_model_len=max_len, model_limit=limit)


def num_bytes(tensors: dict[str, torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


specs_of = st.lists(st.sampled_from([*FULL, WINDOW, SLOT]), unique_by=lambda spec: spec.name, max_size=4)


@given(specs=specs_of, budget=st.integers(0, 6_000_000), max_len=st.integers(1, 4096))
def test_a_plan_fits_the_budget_and_one_longest_sequence(specs: list[StateSpec], budget: int, max_len: int) -> None:
    try:
        made = plan(specs, budget, max_len=max_len)
    except OutOfMemoryError:
        # What was refused would indeed not fit: pages for one sequence with a scratch page each, and two slots.
        paged = [spec for spec in specs if isinstance(spec, PagedState)]
        tokens = {spec.name: 16 * (1 + -(-max_len // 16)) for spec in paged}
        tokens |= {spec.name: min(tokens[spec.name], 16 * (1 + 5)) for spec in paged if spec.window}
        need = sum(tokens[spec.name] * spec.bytes_per_token for spec in paged) + (120 if SLOT in specs else 0)
        assert need > budget
        return
    assert made.max_model_len == max_len and made.num_bytes <= budget
    assert 2 <= made.num_slots <= 9
    for group in made.groups:
        assert group.num_pages - 1 >= group.max_pages(max_len, 16)
        if group.window is None:
            assert group.num_pages - 1 <= 8 * -(-max_len // 16), "more than all sequences can need"
    assert num_bytes(allocate_states(specs, made, CPU)) == made.num_bytes


def test_with_plenty_of_memory_every_sequence_gets_all_it_can_need() -> None:
    made = plan([*FULL, WINDOW, SLOT], 10**9, max_len=160)
    pages = {group.name: group.num_pages for group in made.groups}
    assert made.num_slots == 9 and pages["full"] == 1 + 8 * 10
    # 64 tokens span five pages; then one step's tokens, and as many windows of known prefixes
    assert pages["window_64"] == 1 + 8 * 5 + 256 // 16 + 8 * 5


def test_slots_do_not_starve_pages_when_memory_is_short() -> None:
    big_slot = SlotState(name="running", shape=(100_000,), dtype=torch.float32)
    made = plan([*FULL, big_slot], 3_000_000, max_len=1600)
    assert made.num_slots - 1 < 8
    assert made.groups[0].num_pages - 1 >= 2 * 100, "room for more than one longest sequence remains"


def test_tensors_have_the_shapes_of_their_specs_and_are_zero() -> None:
    made = plan([*FULL, WINDOW, SLOT], 500_000, max_len=160)
    pages = {group.name: group.num_pages for group in made.groups}
    tensors = allocate_states([*FULL, WINDOW, SLOT], made, CPU)
    assert tensors["key"].shape == (pages["full"], 16, 2, 8) and tensors["key"].dtype == torch.float32
    assert tensors["near"].shape == (pages["window_64"], 16, 4) and tensors["near"].dtype == torch.float16
    assert tensors["running"].shape == (made.num_slots + made.num_snapshots, 3, 5)
    assert not any(tensor.any() for tensor in tensors.values())


def test_a_slot_is_copied_or_starts_from_zero_and_the_others_stay() -> None:
    made = plan([*FULL, SLOT], 500_000, max_len=160)
    states = allocate_states([*FULL, SLOT], made, CPU)
    states["key"].fill_(1)
    states["running"][:] = torch.arange(len(states["running"]))[:, None, None]
    copy_slot([*FULL, SLOT], states, 0, 1)
    copy_slot([*FULL, SLOT], states, 4, 3)
    assert states["running"][:6, 0, 0].tolist() == [0, 0, 2, 4, 4, 5]
    assert states["key"].all()


def test_snapshots_take_a_share_of_what_slots_leave_and_none_without_the_cache() -> None:
    made = plan([*FULL, SLOT], 500_000, max_len=160)
    assert made.num_snapshots == 8
    without = plan([*FULL, SLOT], 500_000, max_len=160, caches=False)
    assert without.num_snapshots == 0 and made.num_bytes - 8 * 60 <= without.num_bytes <= 500_000
    assert plan(list(FULL), 500_000, max_len=160).num_snapshots == 0
    big_slot = SlotState(name="running", shape=(10_000,), dtype=torch.float32)
    short = plan([*FULL, big_slot], 650_000, max_len=1600)
    assert short.num_slots - 1 == 5 and short.num_snapshots == 1


def test_drafts_need_a_row_beside_every_slot() -> None:
    options = EngineOptions(page_size=16, max_num_seqs=8, kv_cache_memory_bytes=500_000, speculative_config={})
    made = plan_states([*FULL, SLOT], options, device=CPU, max_model_len=160, model_limit=None)
    tensors = allocate_states([*FULL, SLOT], made, CPU)
    assert made.num_backups == made.num_slots == 9 and num_bytes(tensors) == made.num_bytes
    assert len(tensors["running"]) == made.num_rows == made.backup_row(made.num_slots - 1) + 1
    assert made.backup_row(0) == 9 + made.num_snapshots
    without_slots = plan_states(list(FULL), options, device=CPU, max_model_len=160, model_limit=None)
    assert without_slots.num_backups == 0


def test_a_limit_of_the_user_is_refused_and_not_shortened() -> None:
    with pytest.raises(OutOfMemoryError, match=r"4096 tokens need 526336 bytes.*gives 526335.*lower max_model_len"):
        plan(list(FULL), 526_335, max_len=4096)
    assert plan(list(FULL), 526_336, max_len=4096).max_model_len == 4096


def test_a_limit_of_the_model_shrinks_to_what_fits_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    made = plan(list(FULL), 400_000)
    assert MIN_MODEL_LEN <= made.max_model_len < 4096 and "max_model_len" in caplog.text
    assert made.max_model_len == 16 * (400_000 // (128 * 16) - 1)
    with pytest.raises(OutOfMemoryError, match=f"{MIN_MODEL_LEN} tokens.*raise kv_cache_memory_bytes"):
        plan(list(FULL), 200_000)
    assert plan(list(FULL), 200_000, limit=1000).max_model_len == 1000


def test_without_any_limit_there_is_a_default() -> None:
    assert plan([SLOT], 10**6, limit=None).max_model_len == UNLIMITED_MODEL_LEN
    assert plan([], 0, limit=None).num_slots == 9


def test_the_default_budget_is_a_share_of_the_available_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("autodeploy.runtime.states.available_bytes", lambda device: 1_052_672)
    assert plan(list(FULL), None, max_len=4096).num_bytes == 526_336
    with pytest.raises(OutOfMemoryError, match=r"memory_fraction=0.5 of the free memory.*raise memory_fraction"):
        plan(list(FULL), None, max_len=4097)


def test_what_the_device_refuses_is_an_error_of_ours() -> None:
    spec = PagedState(name="key", shape=(2**40,), dtype=torch.float32)
    made = plan([spec], 2**62, max_len=16)
    with pytest.raises(OutOfMemoryError, match="cpu did not give"):
        allocate_states([spec], made, CPU)
