"""ServedStep: the size of a step follows from its batch inputs, as counted by hand."""

import torch
from torch import Tensor

from autodeploy.bench.profile.watch import ServedStep
from autodeploy.debug.costs import Step


def _step(**inputs: Tensor) -> ServedStep:
    return ServedStep(inputs, 0.0, 0.0)


def test_a_mixed_step() -> None:
    # Three tokens at the end of a context of ten see 8, 9 and 10 tokens; one that decodes sees 20.
    step = _step(
        input_ids=torch.zeros(1, 4, dtype=torch.int64),
        cu_seqlens=torch.tensor([0, 3, 4]),
        seq_lens=torch.tensor([10, 20]),
        logits_indices=torch.tensor([2, 3]),
    )
    assert step.size == Step(tokens=4, sequences=2, context=15, keys=(8 + 9 + 10 + 20) / 4, rows=2)
    assert not step.decodes


def test_sizes_are_those_of_plain_steps() -> None:
    decode = _step(
        input_ids=torch.zeros(1, 3, dtype=torch.int64),
        cu_seqlens=torch.arange(4),
        seq_lens=torch.full((3,), 50),
        logits_indices=torch.arange(3),
    )
    assert decode.size == Step.decode(3, 50) and decode.decodes
    prefill = _step(
        input_ids=torch.zeros(1, 7, dtype=torch.int64),
        cu_seqlens=torch.tensor([0, 7]),
        seq_lens=torch.tensor([7]),
        logits_indices=torch.tensor([6]),
    )
    assert prefill.size == Step.prefill(7) and not prefill.decodes


def test_a_graph_that_reads_no_contexts() -> None:
    step = _step(input_ids=torch.zeros(1, 2, dtype=torch.int64), state_slots=torch.tensor([1, 2]))
    assert step.size == Step(tokens=2, sequences=2, context=0, keys=0, rows=2)
    assert step.decodes
