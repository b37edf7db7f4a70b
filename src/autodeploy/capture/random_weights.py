"""Copies of modules with random weights: what probes run in place of modules whose parameters have no storage."""

import copy
import itertools
import math

import torch
from torch import Tensor, nn

LARGE = 1 << 18
"""Elements of a weight from which random values are shared, at shifted places, instead of drawn one by one."""

_MOST = 1 << 22
"""Values that are drawn for one weight, about: more rows lie closer together."""

_ROW_SHIFT, _STACK_SHIFT = 97, 7919
"""Elements between neighbouring rows, and between neighbouring matrices of a stack, of a large weight: primes, so that
no two rows agree"""


def with_random_weights(module: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
    """A copy on the CPU with random parameters, in a dtype or in the dtype of each; buffers keep their values.

    However large a parameter is, its copy takes little memory: rows of a large one overlap. It must not be written to.
    """
    generator = torch.Generator().manual_seed(1)
    memo: dict[int, object] = {}
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        if id(tensor) in memo:
            continue
        wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        if isinstance(tensor, nn.Parameter):
            memo[id(tensor)] = nn.Parameter(_random(tuple(tensor.shape), wanted, generator), requires_grad=False)
        else:
            memo[id(tensor)] = tensor.detach().clone().to(wanted)
    return copy.deepcopy(module, memo)


def _random(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Values of a size that keeps what products give near 1."""
    scale = shape[-1] ** -0.5 if len(shape) > 1 else 0.5
    if math.prod(shape) < LARGE or len(shape) not in (2, 3):
        return (torch.randn(shape, generator=generator) * scale).to(dtype)
    row = max(1, min(_ROW_SHIFT, shape[-1] // 8, _MOST // shape[-2]))
    strides = (min(_STACK_SHIFT, shape[-2] * row), row, 1)[-len(shape) :]
    size = 1 + sum((count - 1) * stride for count, stride in zip(shape, strides, strict=True))
    return (torch.randn(size, generator=generator) * scale).to(dtype).as_strided(shape, strides)
