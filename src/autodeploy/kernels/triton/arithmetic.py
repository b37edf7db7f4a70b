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


ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", "sigmoid", "relu2", "quick_gelu")
"""Names that `activated` knows."""


@triton.jit
def activated(x, NAME: tl.constexpr):
    """The activation function of a name in `ACTIVATIONS`, of float32 values."""
    tl.static_assert(x.dtype == tl.float32)
    if NAME == "silu":
        return x * tl.sigmoid(x)
    elif NAME == "gelu":
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif NAME == "gelu_tanh":  # tanh(y) = 2 · sigmoid(2y) - 1
        return x * tl.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
    elif NAME == "relu":
        return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif NAME == "sigmoid":
        return tl.sigmoid(x)
    elif NAME == "relu2":
        positive = tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)
        return positive * positive
    else:
        tl.static_assert(NAME == "quick_gelu")
        return x * tl.sigmoid(1.702 * x)


def why_no_activation(name: str) -> str | None:
    """The reason that `activated` cannot take a name, or None."""
    return None if name in ACTIVATIONS else f"activation {name!r}; there are kernels for {', '.join(ACTIVATIONS)}"
