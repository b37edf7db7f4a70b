"""Products by torch's library, which has them on CPUs too: both ways of scaling give what the op gives."""

import pytest
import torch

from autodeploy.kernels import provider
from autodeploy.ops.fp8_linear import FLOAT8, as_float8, fp8_linear

CUDA = torch.device("cuda")
pytestmark = pytest.mark.skipif(bool(provider.unavailable(CUDA)), reason=str(provider.unavailable(CUDA)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_rows", [0, 1, 17])
@pytest.mark.parametrize("has_bias", [True, False])
def test_gives_what_the_op_gives(dtype: torch.dtype, num_rows: int, has_bias: bool) -> None:
    from autodeploy.kernels.triton.scaled_mm import multiply_by_library

    torch.manual_seed(0)
    x, bias = torch.randn(num_rows, 64).to(dtype), torch.randn(48).to(dtype) if has_bias else None
    weight, scales = as_float8(torch.randn(48, 64) * torch.rand(48, 1), None)
    found = multiply_by_library(*as_float8(x, None), weight, scales, bias, dtype)
    expected = fp8_linear(x, weight, scales, bias, None)
    tolerance = fp8_linear.tolerance[dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("shape", "block_size"), [((48, 64), 128), ((40, 64), None), ((48, 72), None)])
def test_takes_whole_sizes_with_a_scale_per_row(shape: tuple[int, int], block_size: int | None) -> None:
    from autodeploy.kernels.triton.scaled_mm import is_for_library

    with torch._subclasses.FakeTensorMode():
        assert is_for_library(torch.empty(48, 64, dtype=FLOAT8, device="cuda"), None)
        assert not is_for_library(torch.empty(shape, dtype=FLOAT8, device="cuda"), block_size)
        assert not is_for_library(torch.empty(48, 64, dtype=FLOAT8), None)
