"""Arguments of real sizes for each op with a Triton kernel, without data: what the kernels are compiled for."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Arguments = dict[str, Any]


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def rms_norm() -> list[Arguments]:
    facts = {"eps": 1e-6, "weight_offset": 0.0, "scale_in_float32": False}
    heads = empty(1, 64, 48, 128)[:, :, :32]
    return [
        {"x": empty(1, 1, 4096), "weight": empty(4096), **facts},
        {"x": heads, "weight": empty(128), **facts},
        {"x": empty(1, 7, 32768, dtype=torch.float32), "weight": None, **facts},
    ]


def add_rms_norm() -> list[Arguments]:
    x = empty(1, 64, 4096)
    facts = {"eps": 1e-6, "weight_offset": 1.0, "scale_in_float32": True}
    return [{"x": x, "residual": x, "weight": empty(4096), **facts}]


def gated_rms_norm() -> list[Arguments]:
    facts = {"eps": 1e-6, "activation": "silu", "groups": 8, "gate_first": True, "scale_in_float32": True}
    return [{"x": empty(1, 64, 4096), "gate": empty(1, 64, 4096), "weight": empty(4096), **facts}]


def layer_norm() -> list[Arguments]:
    return [{"x": empty(1, 64, 2560), "weight": empty(2560), "bias": empty(2560), "eps": 1e-5}]


SIZES: dict[str, Callable[[], list[Arguments]]] = {
    "rms_norm": rms_norm,
    "add_rms_norm": add_rms_norm,
    "gated_rms_norm": gated_rms_norm,
    "layer_norm": layer_norm,
}
