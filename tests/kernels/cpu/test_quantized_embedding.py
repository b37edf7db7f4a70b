"""quantized_embedding: an index that the table has not is an error, whether a step runs or is repeated."""

import pytest
import torch
from torch import Tensor

from autodeploy.compile.replay import Memory, record
from autodeploy.kernels.cpu.native import why_unavailable
from autodeploy.kernels.cpu.quantized_embedding import quantized_embedding_cpu
from autodeploy.ops.quantized_linear import pack

pytestmark = pytest.mark.skipif(why_unavailable() is not None, reason=f"no native kernels: {why_unavailable()}")


@pytest.mark.parametrize("index", [-1, 48])
def test_an_index_beyond_the_table_is_refused(index: int) -> None:
    weight = pack(torch.randint(0, 256, (40, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)), 8)
    scales = torch.ones(3, 1, 16, dtype=torch.float16)

    def look_up(indices: Tensor) -> Tensor:
        return quantized_embedding_cpu(indices, weight, scales, None, 64, torch.float32)

    with pytest.raises(IndexError, match="48 rows"):
        look_up(torch.tensor([[3, index]]))
    step, result = record(look_up, (torch.tensor([[3, 1]]),), (), Memory())
    assert torch.equal(step.run((torch.tensor([[3, 1]]),)), result)
    with pytest.raises(IndexError, match="fault"):
        step.run((torch.tensor([[3, index]]),))
