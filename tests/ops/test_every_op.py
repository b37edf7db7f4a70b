"""Every op in the table is tested by being declared: its samples, its fake, its registration."""

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

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
        arguments = tree_map_only(torch.Tensor, lambda v: v.to(dtype) if v.is_floating_point() else v, sample)
        real = op(**arguments)
        mode = torch._subclasses.FakeTensorMode()
        with mode:
            fakes = tree_map_only(torch.Tensor, mode.from_tensor, arguments)
            fake = op(**fakes)
        pairs = [(real, fake)] if isinstance(real, torch.Tensor) else list(zip(real, fake, strict=True))
        for mine, faked in pairs:
            assert (mine.shape, mine.dtype) == (faked.shape, faked.dtype)


@pytest.mark.parametrize("op", SAMPLED, ids=lambda op: op.name)
def test_leaves_its_arguments_alone(op: Op) -> None:
    for sample in op.samples():
        before = tree_map_only(torch.Tensor, torch.clone, sample)
        op(**sample)
        for mine, original in zip(tree_leaves(sample), tree_leaves(before), strict=True):
            assert not isinstance(mine, torch.Tensor) or torch.equal(mine, original)
