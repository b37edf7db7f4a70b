"""Fake values: one computation for arguments alike, and another wherever anything known of them differs."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from autodeploy.graph.fake_values import FakeValues


def _symbolic(mode: FakeTensorMode) -> torch.Tensor:
    dims = [DimDynamic.DYNAMIC, DimDynamic.STATIC]
    return mode.from_tensor(torch.empty(7, 4), symbolic_context=StatelessSymbolicContext(dynamic_sizes=dims))


def test_results_are_those_of_the_function() -> None:
    values = FakeValues(FakeTensorMode(shape_env=ShapeEnv()))
    x, y = _symbolic(values.mode), _symbolic(values.mode)
    calls = [
        (torch.ops.aten.add.Tensor, (x, 1)),
        (torch.ops.aten.add.Tensor, (x, 1.5)),
        (torch.ops.aten.transpose.int, (x, 0, 1)),
        (torch.ops.aten.transpose.int, (y, 0, 1)),
        (torch.ops.aten.cat.default, ([x, x], 1)),
        (torch.ops.aten.split_with_sizes.default, (x, [1, 3], 1)),
    ]
    for function, args in calls:
        with values.mode:
            expected = function(*args)
        for _ in range(2):
            found = values.of(function, args)
            pairs = [(found, expected)] if isinstance(found, torch.Tensor) else list(zip(found, expected, strict=True))
            for one, other in pairs:
                assert (one.dtype, str(one.shape), one.stride()) == (other.dtype, str(other.shape), other.stride())


def test_only_arguments_alike_share() -> None:
    values = FakeValues(FakeTensorMode(shape_env=ShapeEnv()))
    ints = [values.empty((2, 3), torch.int64) for _ in range(2)]
    assert ints[0] is ints[1] is not values.empty((3, 2), torch.int64)
    add = torch.ops.aten.add.Tensor
    assert values.of(add, (ints[0], 1)) is values.of(add, (ints[1], 1))
    # 1, 1.0 and True are equal, and their sums have different types
    assert values.of(add, (ints[0], 1)).dtype == torch.int64 and values.of(add, (ints[0], 1.0)).dtype == torch.float32
    turned = values.of(torch.ops.aten.t.default, (values.empty((3, 2), torch.int64),))
    assert values.of(add, (ints[0], 1)).stride() != values.of(add, (turned, 1)).stride()
