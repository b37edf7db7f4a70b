"""The law of cached ops, by enumeration: any split, packing and eviction gives the whole-sequence result."""

import pytest
import torch

from autodeploy.ops import OPS, Op
from tests.ops import mixers
from tests.ops.laws import Replay

MIXERS = [op for op in OPS.values() if op.states is not None]


def test_the_made_up_mixers_are_covered() -> None:
    assert {"attention", mixers.decaying_sum.name} <= {op.name for op in MIXERS}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("op", MIXERS, ids=lambda op: op.name)
def test_any_schedule_gives_the_whole_result(op: Op, seed: int) -> None:
    assert op.samples is not None
    for sample in op.samples():
        expected = op.reference(**sample)
        result = Replay(op, sample, seed).run()
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("op", MIXERS, ids=lambda op: op.name)
def test_the_twin_takes_the_same_arguments_and_more(op: Op) -> None:
    assert op.cached is not None
    assert op.cached.parameters[: len(op.parameters)] == op.parameters
    assert set(op.cached.mutates) <= set(op.cached.parameters)


def test_the_law_can_fail() -> None:
    """A twin that forgets its state breaks the law, so the law is able to find one."""
    sample = mixers.decaying_sum.samples()[0]
    replay = Replay(mixers.decaying_sum, sample, seed=1)
    replay._evict = lambda sequence: None  # type: ignore[method-assign]
    real_step = replay._step

    def forgetful(sequences: list[int]) -> None:
        for state in replay.states.values():
            state.zero_()
        real_step(sequences)

    replay._step = forgetful  # type: ignore[method-assign]
    assert not torch.allclose(replay.run(), mixers.decaying_sum.reference(**sample), rtol=1e-4, atol=1e-5)
