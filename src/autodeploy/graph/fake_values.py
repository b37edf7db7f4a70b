"""Fake values: a call and its fake arguments go in, what it would return comes out, computed once for arguments alike.

The layers of a model make the same call over and over; a fake tensor costs a millisecond to compute and nothing to
share, since what is known of it (sizes, strides, dtype, device) never changes. The sizes of a result follow from those
of the arguments for every op that transforms insert.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode


class FakeValues:
    """Results under one fake mode."""

    def __init__(self, fake_mode: FakeTensorMode):
        self.mode = fake_mode
        self._results: dict[Any, Any] = {}

    def of(self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any] | None = None) -> Any:
        """What `function(*args, **kwargs)` returns; arguments are fake tensors, numbers and lists of them."""
        kwargs = kwargs or {}
        key = (function, _known(args), _known(sorted(kwargs.items())))
        if key not in self._results:
            with self.mode:
                self._results[key] = function(*args, **kwargs)
        return self._results[key]

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A contiguous tensor on the CPU."""
        value: torch.Tensor = self.of(_empty, (list(shape), dtype))
        return value


def _empty(shape: list[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


def _known(value: Any) -> object:
    """All that a fake result can depend on, as something to compare and to hash."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.device, tuple(map(_known, value.shape)), tuple(map(_known, value.stride()))
    if isinstance(value, torch.SymInt):
        return value.node.expr
    if isinstance(value, list | tuple):
        return tuple(map(_known, value))
    return type(value), value  # 1, 1.0 and True are equal and are not the same argument
