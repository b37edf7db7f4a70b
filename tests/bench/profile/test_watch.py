"""Watch: steps are seen only while they are to be, and their sizes are those counted by hand."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from autodeploy.bench.profile import watch as module
from autodeploy.bench.profile.watch import ServedStep, Watch
from autodeploy.compile.program import BatchLimits, NamedGraph, Program, Progress
from autodeploy.config import Options
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


class _Preparation:
    def reserved_bytes(self, limits: BatchLimits) -> int:
        return 0

    def prepare(self, states: Mapping[str, Tensor], limits: BatchLimits, progress: Progress) -> None: ...


def test_what_is_seen_of_a_program(monkeypatch: pytest.MonkeyPatch) -> None:
    preparation, served = _Preparation(), []

    def function(ids: Tensor, state: Tensor) -> Tensor:
        served.append(state)
        return ids + 1

    def choosing(draws: object, ids: Tensor, state: Tensor) -> tuple[Tensor, None]:
        assert draws is None
        return function(ids, state), None

    graph = NamedGraph("text", function, ("input_ids",), ("memory",), preparation, run_and_choose=choosing)
    traits: dict[str, Any] = {"vocab_size": 8, "max_model_len": None, "dtype": torch.float32}
    program = Program(graphs={"text": graph}, states=(), device=torch.device("cpu"), **traits)
    monkeypatch.setattr(module, "build", lambda model, options, *, lowered: program)
    watch = Watch()
    seen = watch.build("m", Options())
    assert seen.graphs["text"].preparation is preparation  # what captures graphs still does

    ids, state = torch.zeros(1, 2, dtype=torch.int64), torch.zeros(3)
    results = []
    for watch.is_recording, watch.is_copying in ((False, False), (True, False), (True, True)):
        results.append(seen.run({"input_ids": ids}, {"memory": state}))
    results.append(seen.run_and_choose({"input_ids": ids}, {"memory": state}, None)[0])
    ids.fill_(5)  # the runtime may fill its buffers anew
    assert all(torch.equal(result, torch.ones_like(ids)) for result in results)
    assert all(given is state for given in served) and len(served) == 4
    plain, *copied = watch.steps
    assert plain.inputs == {} and plain.begin < plain.end <= copied[0].begin and len(copied) == 2
    assert all(step.inputs["memory"] is state and step.inputs["input_ids"].tolist() == [[0, 0]] for step in copied)
