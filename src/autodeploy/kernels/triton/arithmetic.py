"""What several kernels compute with."""

import triton
import triton.language as tl

from autodeploy import env

INTERPRETED = tl.constexpr(env.is_triton_interpreted())


@triton.jit
def dot(a, b, sum):
    """sum + a · b with a float32 sum; exact products of float32, no TF32.

    Triton's interpreter (3.6 to 3.9) multiplies the bits of bfloat16 as if they were whole numbers, so there the
    factors are float32.
    """
    if INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, sum, input_precision="ieee")
