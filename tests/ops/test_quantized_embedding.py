"""quantized_embedding against the whole matrix that its weight stands for."""

import pytest
import torch

from autodeploy.ops import quantized_embedding
from autodeploy.ops.quantized_linear import dequantize


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_those_of_the_matrix(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    assert quantized_embedding.samples is not None
    for sample in quantized_embedding.samples():
        weight, scales, num_inputs = sample["weight"], sample["scales"], sample["num_inputs"]
        matrix = dequantize(weight, scales, sample["offsets"], weight.shape[0] * 16, num_inputs)
        rows = quantized_embedding(**sample | {"dtype": dtype})
        assert rows.dtype == dtype
        torch.testing.assert_close(rows, matrix[sample["indices"]].to(dtype), rtol=0, atol=0)
