"""gated_activation: activation and product in one pass over the fused projection's output."""

from torch import Tensor

from autodeploy.kernels.cpu.native import INT, INT64, POINTER, THREADS, NativeFunction, num_threads, why_refused
from autodeploy.ops.mlp import gated_activation

ACTIVATION_NUMBERS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "sigmoid": 4, "relu2": 5, "quick_gelu": 6}
"""As `Activation` in csrc/activation.h counts them."""

_MIN_ELEMENTS_FOR_THREADS = 1 << 14

_gated_activation = NativeFunction("gated_activation", (POINTER, POINTER, INT64, INT64, INT, THREADS))


def _supports(gate_up: Tensor, activation: str) -> str | None:
    if activation not in ACTIVATION_NUMBERS:
        return f"activation {activation!r}; there are kernels for {', '.join(ACTIVATION_NUMBERS)}"
    if gate_up.shape[-1] % 2:
        return f"{gate_up.shape[-1]} columns do not split into gate and up"
    return why_refused(gate_up)


@gated_activation.kernel("cpu", _supports, fuses_with_neighbours=True, batch_invariant=True)
def gated_activation_cpu(gate_up: Tensor, activation: str) -> Tensor:
    """`gated_activation`, rounded once at the end."""
    gate_up = gate_up.contiguous()
    width = gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], width)
    size = out.numel()
    _gated_activation[gate_up.dtype](
        gate_up.data_ptr(),
        out.data_ptr(),
        size // (width or 1),
        width,
        ACTIVATION_NUMBERS[activation],
        num_threads(size, _MIN_ELEMENTS_FOR_THREADS),
    )
    return out
