"""Every op in the table is tested by being declared: its samples, its fake, its registration."""

import pytest
import torch

from autodeploy.ops import OPS, Op
from autodeploy.ops.op import find_op

SAMPLED = [op for op in OPS.values() if op.samples is not None]


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_is_sampled_or_made_from_a_sampled_op(op: Op) -> None:
    twins = [other.cached for other in OPS.values() if other.cached is not None]
    captured = op.name.startswith("captured_")  # tested against `attention` in test_captured.py
    assert op.samples is not None or op in twins or captured, f"op {op.name} has nothing that tests it"


@pytest.mark.parametrize("op", OPS.values(), ids=OPS)
def test_has_a_docstring_with_shapes(op: Op) -> None:
    documentation = op.reference.__doc__ or ""
    assert "`[" in documentation, f"op {op.name} does not say its shapes"


@pytest.mark.parametrize("op", SAMPLED, ids=lambda op: op.name)
def test_registered_operator_equals_reference(op: Op) -> None:
    assert find_op(op.overload) is op
    for sample in op.samples():
        torch.testing.assert_close(op(**sample), op.reference(**sample), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("op", SAMPLED, ids=lambda op: op.name)
def test_fake_has_the_shapes_and_dtypes_of_the_result(op: Op, dtype: torch.dtype) -> None:
    for sample in op.samples():
        arguments = {
            k: v.to(dtype) if isinstance(v, torch.Tensor) and v.is_floating_point() else v for k, v in sample.items()
        }
        real = op(**arguments)
        mode = torch._subclasses.FakeTensorMode()
        with mode:
            fakes = {k: mode.from_tensor(v) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
            fake = op(**fakes)
        pairs = [(real, fake)] if isinstance(real, torch.Tensor) else list(zip(real, fake, strict=True))
        for mine, faked in pairs:
            assert (mine.shape, mine.dtype) == (faked.shape, faked.dtype)


@pytest.mark.parametrize("op", SAMPLED, ids=lambda op: op.name)
def test_leaves_its_arguments_alone(op: Op) -> None:
    for sample in op.samples():
        before = {k: v.clone() for k, v in sample.items() if isinstance(v, torch.Tensor)}
        op(**sample)
        for name, value in before.items():
            torch.testing.assert_close(sample[name], value, rtol=0, atol=0)
