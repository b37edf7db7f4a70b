"""What kernels over slot states share: how sequences are given, and which of two kernels takes them.

A recurrent mixer has two kernels. One goes token by token with a part of a sequence's state in registers, for steps of
few tokens each; one turns chunks of tokens into matrix products, for prompts. Those take their factors in the model's
dtype and add up in float32, which is what states are kept in. Either is right for every batch; which
one runs follows from the average number of tokens, so that a launch never waits for the device.
"""

import triton
import triton.language as tl
from torch import Tensor

from autodeploy.kernels.triton.arithmetic import dot
from autodeploy.kernels.triton.launch import why_refused

MOST_TOKENS_ONE_BY_ONE = 4
"""Average of new tokens of a sequence up to which they are gone through one by one."""


def why_not(
    cu_seqlens: Tensor | None, state: Tensor, given: tuple[Tensor | None, ...], *numbers: Tensor | None
) -> str | None:
    """The reason that these sequences cannot be taken, or None.

    Args:
        given: tensors that must have one dtype. numbers: parameters and the like, of any known dtype each.
    """
    if cu_seqlens is None:
        return "no cu_seqlens"
    if not state.is_contiguous():
        return "states with gaps"
    reasons = (why_refused(number) for number in numbers)
    return why_refused(*given) or next((reason for reason in reasons if reason is not None), None)


def goes_one_by_one(num_tokens: int, state_slots: Tensor) -> bool:
    """True when sequences bring so few tokens that chunks of them would be mostly empty."""
    return num_tokens <= MOST_TOKENS_ONE_BY_ONE * state_slots.numel()


def by_token(x: Tensor) -> Tensor:
    """The tensor itself if what belongs to one token lies together, else a copy."""
    return x if x[0, 0].is_contiguous() else x.contiguous()


def contiguous(x: Tensor | None) -> Tensor | None:
    """The tensor, or nothing, without gaps."""
    return None if x is None else x.contiguous()


@triton.jit
def dot_with_parts(a, b, sum):
    """sum + a · b for a float32 b and a in the model's dtype, in which b is taken as a sum of two.

    Two products of bfloat16 are as fast as one of TF32 and lose a hundredth as much.
    """
    if a.dtype == tl.float32:
        return dot(a, b, sum)
    else:
        high = b.to(a.dtype)
        return dot(a, (b - high.to(tl.float32)).to(a.dtype), dot(a, high, sum))


@triton.jit
def dot_parts_of(a, b, sum):
    """sum + a · b for a float32 a and b in the model's dtype, as in `dot_with_parts`."""
    if b.dtype == tl.float32:
        return dot(a, b, sum)
    else:
        high = a.to(b.dtype)
        return dot((a - high.to(tl.float32)).to(b.dtype), b, dot(high, b, sum))
