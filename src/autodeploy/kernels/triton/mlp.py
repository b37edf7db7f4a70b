"""gated_activation: activation and product in one pass over the fused projection's output."""

import triton
import triton.language as tl
from torch import Tensor

from autodeploy.kernels.triton.arithmetic import activated, why_no_activation
from autodeploy.kernels.triton.launch import Launcher, why_refused
from autodeploy.ops.mlp import gated_activation

_BLOCK = 1024


@triton.jit
def _gated_activation_rows(gate_up, out, width, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    own = gate_up + row * 2 * width + columns
    gate = tl.load(own, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(own + width, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + columns, (activated(gate, ACTIVATION) * up).to(out.dtype.element_ty), mask=inside)


_gated_activation = Launcher(_gated_activation_rows)


def _supports(gate_up: Tensor, activation: str) -> str | None:
    if gate_up.shape[-1] % 2:
        return f"{gate_up.shape[-1]} columns do not split into gate and up"
    return why_no_activation(activation) or why_refused(gate_up)


@gated_activation.kernel("triton", _supports, fuses_with_neighbours=True, batch_invariant=True)
def gated_activation_triton(gate_up: Tensor, activation: str) -> Tensor:
    """`gated_activation`, rounded once at the end."""
    gate_up = gate_up.contiguous()
    width = gate_up.shape[-1] // 2
    out = gate_up.new_empty(*gate_up.shape[:-1], width)
    num_rows = out.numel() // (width or 1)
    block = min(_BLOCK, triton.next_power_of_2(width))
    _gated_activation((num_rows, triton.cdiv(width, block)), gate_up, out, width, ACTIVATION=activation, BLOCK=block)
    return out
