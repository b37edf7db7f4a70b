"""Rotary position embedding."""

from typing import Any

import torch
from torch import Tensor

from autodeploy.ops.op import op


def rotate_half(x: Tensor) -> Tensor:
    """(-second half, first half) of the last dimension."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


@op(tolerance={torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3})
def rope(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate the first R dimensions of each head by its token's angles, half-split layout (arXiv 2104.09864).

    Args:
        query: `[1, T, N, H]`. key: `[1, T, K, H]`.
        cos, sin: `[1, T, R]` with R <= H, the angles of both halves side by side.
    Returns:
        Rotated query and key.
    """
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    rotary_dim = cos.shape[-1]

    def rotate(x: Tensor) -> Tensor:
        turned = x[..., :rotary_dim]
        turned = turned * cos + rotate_half(turned) * sin
        return turned if rotary_dim == x.shape[-1] else torch.cat((turned, x[..., rotary_dim:]), dim=-1)

    return rotate(query), rotate(key)


@rope.with_samples
def _rope_samples() -> list[dict[str, Any]]:
    def sample(rotary_dim: int) -> dict[str, Any]:
        angle = torch.randn(1, 5, rotary_dim // 2).repeat(1, 1, 2)
        query, key = torch.randn(1, 5, 4, 16), torch.randn(1, 5, 2, 16)
        return {"query": query, "key": key, "cos": angle.cos(), "sin": angle.sin()}

    return [sample(16), sample(8)]
