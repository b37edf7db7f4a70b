"""Rows of a table of 8 or 4 bits, looked up: for a head that is quantised and whose table is the embedding too."""

from typing import Any

import torch
from torch import Tensor

from autodeploy.ops.op import op
from autodeploy.ops.quantized_linear import TILE, dequantize, pack


def _fake(
    indices: Tensor, weight: Tensor, scales: Tensor, offsets: Tensor | None, num_inputs: int, dtype: torch.dtype
) -> Tensor:
    return indices.new_empty(*indices.shape, num_inputs, dtype=dtype)


@op(tolerance={torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 1e-3}, fake=_fake, batch_invariant=True)
def quantized_embedding(
    indices: Tensor, weight: Tensor, scales: Tensor, offsets: Tensor | None, num_inputs: int, dtype: torch.dtype
) -> Tensor:
    """Rows `indices` of the matrix `[O, I]` that a packed weight stands for (see `quantized_linear`).

    Args:
        indices: `[...]` int64, from 0 to O - 1.
        weight: uint8 of `packed_shape`, `[⌈O/16⌉, ⌈I/32⌉, bits, 16, 4]`.
        scales: float16 `[⌈O/16⌉, G, 16]`.
        offsets: as scales, or None.
        num_inputs: I.
        dtype: of the rows.
    Returns:
        `[..., I]`.
    """
    tiles, lanes = indices.flatten() // TILE, indices.flatten() % TILE
    numbers, own_scales = weight[tiles, :, :, lanes].unsqueeze(3), scales[tiles, :, lanes].unsqueeze(2)
    own_offsets = None if offsets is None else offsets[tiles, :, lanes].unsqueeze(2)
    rows = dequantize(numbers, own_scales, own_offsets, len(tiles), num_inputs)  # each as a tile of one output
    return rows.to(dtype).reshape(*indices.shape, num_inputs)


@quantized_embedding.with_samples
def _quantized_embedding_samples() -> list[dict[str, Any]]:
    def sample(
        indices: Tensor, num_rows: int, num_inputs: int, bits: int, groups: int = 1, *, offsets: bool = False
    ) -> dict[str, Any]:
        shape = (-(-num_rows // TILE), groups, TILE)
        return {
            "indices": indices,
            "weight": pack(torch.randint(0, 2**bits, (num_rows, num_inputs), dtype=torch.uint8), bits),
            "scales": (torch.rand(shape) + 0.5).half(),
            "offsets": torch.randn(shape).half() if offsets else None,
            "num_inputs": num_inputs,
            "dtype": torch.float32,
        }

    return [
        sample(torch.tensor([[0, 39, 16, 16]]), 40, 64, 8),
        sample(torch.arange(37).flip(0), 37, 45, 8),
        sample(torch.tensor([[3], [15]]), 16, 128, 8, groups=2, offsets=True),
        sample(torch.tensor([[17, 2, 5]]), 33, 96, 4, groups=3),
        sample(torch.tensor([[17, 2, 5]]), 33, 128, 4, offsets=True),
        sample(torch.empty(1, 0, dtype=torch.int64), 16, 32, 4),
    ]
