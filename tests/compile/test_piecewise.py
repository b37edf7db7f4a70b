"""What crosses pieces: a row for each token, found by its shapes, in memory that is taken again when it is free."""

import pytest
import torch

from autodeploy.compile.piecewise import PiecewiseGraphs
from autodeploy.compile.program import BatchLimits
from autodeploy.compile.segments import Segment, Segments
from autodeploy.compile.static_batch import StaticInput

LIMITS = BatchLimits(max_num_seqs=2, max_num_batched_tokens=16, max_model_len=16, page_size=4)
INPUTS = [StaticInput.of("input_ids", torch.empty(0, dtype=torch.int64))]


def pieces(*segments: Segment) -> PiecewiseGraphs:
    step = Segments(segments, segments[-1].outputs[0], ())
    return PiecewiseGraphs(step, INPUTS, {}, LIMITS, max_tokens=8, vocab_size=9, device=torch.device("cpu"))


def test_tokens_that_are_laid_out_in_another_way_are_refused() -> None:
    doubled = Segment(lambda ids: [torch.cat((ids, ids), 1)], ("input_ids",), ("both",), is_region=True)
    with pytest.raises(RuntimeError, match=r"both is \(1, 6\) for 3 tokens and \(1, 4\) for one less"):
        pieces(doubled)


def test_memory_is_taken_again_behind_the_last_reader() -> None:
    chain = [Segment(lambda ids: [ids.float()], ("input_ids",), ("x0",), is_region=True)]
    for number in range(1, 7):
        unread = (f"x{number - 1}",)
        add = Segment(lambda x: [x + 1], unread, (f"x{number}",), is_region=number % 2 == 0, unread=unread)
        chain.append(add)
    made = pieces(*chain)
    assert len({crossing.buffer.data_ptr() for crossing in made._crossings.values()}) == 2
    assert {crossing.token_dim for crossing in made._crossings.values()} == {1}
