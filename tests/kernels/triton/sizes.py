"""Arguments of real sizes for each op with a Triton kernel, without data: what the kernels are compiled for."""

import functools
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


def paged(num_tokens: int, num_sequences: int) -> Arguments:
    """Batch inputs with room for 2048 tokens of each sequence in pages of 32."""
    numbers = functools.partial(empty, dtype=torch.int32)
    tables = {"seq_lens": numbers(num_sequences), "page_table": numbers(num_sequences, 64)}
    return {"cu_seqlens": numbers(num_sequences + 1), **tables, "slot_mapping": empty(num_tokens, dtype=torch.int64)}


def cached_attention() -> list[Arguments]:
    def step(num_tokens: int, num_sequences: int) -> Arguments:
        query, key, value = empty(1, num_tokens, 48, 128).split([32, 8, 8], dim=2)
        cache = empty(4096, 32, 8, 128)
        facts = {"sinks": None, "scale": 0.1, "causal": True, "sliding_window": None, "chunk_size": None}
        facts |= {"softcap": None, "slopes": None, "distance_logits": None, "key_cache": cache, "value_cache": cache}
        return {"query": query, "key": key, "value": value, **facts, **paged(num_tokens, num_sequences)}

    everything = {"sliding_window": 512, "softcap": 50.0, "sinks": empty(32), "slopes": empty(32)}
    return [step(1, 1), step(2048, 2) | everything]


def cached_mla() -> list[Arguments]:
    def step(num_tokens: int, num_sequences: int) -> Arguments:
        latent, shared_key = empty(1, num_tokens, 576).split([512, 64], dim=2)
        given = {"query": empty(1, num_tokens, 128, 192), "latent": latent, "shared_key": shared_key}
        given |= {"up": empty(128 * 256, 512), "latent_cache": empty(4096, 32, 1, 576), "scale": 0.1}
        return given | paged(num_tokens, num_sequences)

    return [step(4, 4)]


def gated_activation() -> list[Arguments]:
    return [{"gate_up": empty(1, 64, 28672), "activation": name} for name in ("silu", "gelu")]


def rope() -> list[Arguments]:
    def sample(query_heads: int, key_heads: int, width: int, rotary_dim: int) -> Arguments:
        row = empty(1, 64, query_heads + 2 * key_heads, width)
        query, key, _ = row.split([query_heads, key_heads, key_heads], dim=2)
        angles = empty(1, 64, rotary_dim)
        return {"query": query, "key": key, "cos": angles, "sin": angles}

    return [sample(32, 8, 128, 128), sample(32, 2, 256, 64)]


def quantized_linear() -> list[Arguments]:
    def sample(rows: int, bits: int, groups: int, offsets: bool) -> Arguments:
        scales = empty(448, groups, 16, dtype=torch.float16)
        return {
            "x": empty(1, rows, 4096),
            "weight": empty(448, 128, bits, 16, 4, dtype=torch.uint8),
            "scales": scales,
            "offsets": scales if offsets else None,
            "bias": None,
            "num_outputs": 7168,
        }

    return [sample(rows, *form) for rows in (1, 64) for form in ((8, 1, False), (4, 128, True))]


SIZES: dict[str, Callable[[], list[Arguments]]] = {
    "cached_attention": cached_attention,
    "cached_mla": cached_mla,
    "rms_norm": rms_norm,
    "add_rms_norm": add_rms_norm,
    "gated_rms_norm": gated_rms_norm,
    "layer_norm": layer_norm,
    "gated_activation": gated_activation,
    "rope": rope,
    "quantized_linear": quantized_linear,
}
