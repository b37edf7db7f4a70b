"""Recurrent mixers over slot states in Triton: whole chunks and parts of one, sequences without tokens, padding."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from autodeploy.kernels import provider
from autodeploy.kernels.triton import sequences
from autodeploy.ops import OPS, Op
from autodeploy.ops.state import SLOT_GROUP

CUDA = torch.device("cuda")
IS_INTERPRETED = not provider.unavailable(CUDA) and not torch.cuda.is_available()

pytestmark = pytest.mark.skipif(not IS_INTERPRETED, reason="runs in Triton's interpreter, on CPU tensors")

PRIORITY = provider.priority(CUDA)
FEW_CHUNKS = [70, 0, 5]
SLOTS = "state_slots"
MIXERS = [
    op
    for op in OPS.values()
    if op.cached is not None and SLOTS in op.cached.parameters and PRIORITY[0] in op.cached.kernels
]


def case(op: Op, counts: list[int]) -> dict[str, Any]:
    """The op's first sample with these numbers of new tokens, and states that are not empty."""
    torch.manual_seed(0)
    assert op.cached is not None and op.samples is not None and op.states is not None
    sample, total = op.samples()[0], sum(counts)
    length = int(sample["cu_seqlens"][-1])

    def lengthened(value: Any) -> Any:
        per_token = isinstance(value, Tensor) and value.dim() > 2 and value.shape[:2] == (1, length)
        return torch.cat([value] * -(-total // length), dim=1)[:, :total] if per_token else value

    states = {name: spec for name, spec in op.states(**sample).items() if spec.group == SLOT_GROUP}
    given = {name: lengthened(value) for name, value in sample.items()}
    given |= {name: torch.randn(len(counts) + 2, *spec.shape) / 4 for name, spec in states.items()}
    given["cu_seqlens"] = torch.tensor([0, *counts]).cumsum(0).to(torch.int32)
    given["seq_lens"] = torch.tensor([count + 7 * (at % 3 != 2) for at, count in enumerate(counts)], dtype=torch.int32)
    given[SLOTS] = torch.randperm(len(counts)).to(torch.int32) + 1
    return {name: given[name] for name in op.cached.parameters}


def check(op: Op, given: dict[str, Any]) -> None:
    assert op.cached is not None
    kernel = op.cached.kernels["triton"]
    assert kernel.supports(**given) is None
    again = {name: value.clone() if isinstance(value, Tensor) else value for name, value in given.items()}
    expected = op.cached.reference(**again)
    torch.testing.assert_close(kernel.function(**given), expected, rtol=1e-4, atol=1e-4)
    for name in op.cached.mutates:
        torch.testing.assert_close(given[name], again[name], rtol=1e-4, atol=1e-4)


def test_the_mixers_are_covered() -> None:
    assert {"causal_conv", "ssd", "selective_scan", "delta_rule", "linear_attention", "token_shift", "mlstm"} <= {
        op.name for op in MIXERS
    }


@pytest.mark.parametrize("op", MIXERS, ids=lambda op: op.name)
def test_whole_chunks_parts_and_sequences_without_tokens(op: Op) -> None:
    counts = [64, 0, 65, 1]
    given = case(op, counts)
    assert not sequences.goes_one_by_one(sum(counts), given[SLOTS])
    check(op, given)


@pytest.mark.parametrize("op", MIXERS, ids=lambda op: op.name)
def test_a_few_tokens_each(op: Op) -> None:
    counts = [1, 0, 5, 2]
    given = case(op, counts)
    assert sequences.goes_one_by_one(sum(counts), given[SLOTS])
    check(op, given)


@pytest.mark.parametrize("op", MIXERS, ids=lambda op: op.name)
def test_padding_changes_nothing(op: Op) -> None:
    """A batch filled up to a bucket: sequences of one token each, all in the scratch slot."""
    given = case(op, [1, 1, 1, 1])
    given[SLOTS] = torch.tensor([2, 1, 0, 0], dtype=torch.int32)
    assert op.cached is not None
    clones = {name: value.clone() if isinstance(value, Tensor) else value for name, value in given.items()}
    expected = op.cached.reference(**clones)
    result = op.cached.kernels["triton"].function(**given)
    torch.testing.assert_close(result[:, :2], expected[:, :2], rtol=1e-4, atol=1e-4)
    for name in op.cached.mutates:
        torch.testing.assert_close(given[name][1:], clones[name][1:], rtol=1e-4, atol=1e-4)


def tuned(op: Op) -> list[Any]:
    """What has a choice among what chunks launch."""
    from autodeploy.kernels.triton.launch import written_down

    assert op.cached is not None
    with written_down() as launches:
        op.cached.kernels["triton"].function(**case(op, FEW_CHUNKS))
    return [found.kernel for found in launches if len(found.kernel.configurations) > 1]


TUNED = [op for op in MIXERS if IS_INTERPRETED and tuned(op)]
OTHERS = [(op, place) for op in TUNED for place in range(1, max(len(each.configurations) for each in tuned(op)))]


@pytest.mark.parametrize(("op", "place"), OTHERS, ids=lambda value: getattr(value, "name", value))
def test_other_configurations(op: Op, place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for launcher in tuned(op):
        own = launcher.configurations
        monkeypatch.setattr(launcher, "configurations", own[place % len(own) :])
    check(op, case(op, FEW_CHUNKS))


@pytest.mark.parametrize("op", TUNED, ids=lambda op: op.name)
def test_measuring_moves_no_state_on(op: Op, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from tests.kernels.triton.measured import tuned_on_the_cpu

    bench = tuned_on_the_cpu(monkeypatch, tmp_path)
    check(op, case(op, [17, 0, 5]))
    assert bench.num_measured > 1


def test_chunks_of_recurrences_are_measured() -> None:
    assert {"causal_conv", "ssd", "delta_rule"} <= {op.name for op in TUNED}
