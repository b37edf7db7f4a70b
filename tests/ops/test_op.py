"""Declaring ops and kernels: what is refused, and how arguments bind."""

import pytest
import torch
from torch import Tensor

from autodeploy.ops import OPS, find_op, linear
from autodeploy.ops.batch_inputs import BATCH_INPUTS, lookup
from autodeploy.ops.state import PagedState, SlotState


def test_a_kernel_must_take_the_ops_parameters() -> None:
    with pytest.raises(TypeError, match=r"kernel 'mine' of op 'linear' must take exactly"):

        @linear.kernel("mine")
        def _(x: Tensor, w: Tensor) -> Tensor:
            return x

    assert "mine" not in linear.kernels


def test_arguments_bind_by_name() -> None:
    assert linear.arguments((1, 2), {"bias": 3}) == {"x": 1, "weight": 2, "bias": 3}


def test_finding_an_op_by_target() -> None:
    assert find_op(torch.ops.autodeploy.linear.default) is OPS["linear"]
    assert find_op(torch.ops.aten.linear.default) is None
    assert find_op("linear") is None


def test_batch_inputs_are_found_with_and_without_group() -> None:
    assert lookup("page_table_window_512") is BATCH_INPUTS["page_table_{group}"]
    assert lookup("slot_mapping_full") is BATCH_INPUTS["slot_mapping_{group}"]
    assert lookup("page_table_") is None and lookup("weights") is None


def test_states_group_by_what_may_be_freed_together() -> None:
    full = PagedState(name="a", shape=(2, 8), dtype=torch.bfloat16)
    window = PagedState(name="b", shape=(2, 8), dtype=torch.bfloat16, window=512)
    slot = SlotState(name="c", shape=(3, 4), dtype=torch.float32)
    assert (full.group, window.group, slot.group) == ("full", "window_512", "slots")
    assert full.bytes_per_token == 32 and slot.bytes_per_slot == 48
