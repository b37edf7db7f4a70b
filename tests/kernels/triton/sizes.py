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
    def step(num_tokens: int, num_sequences: int, cache_dtype: torch.dtype = torch.bfloat16) -> Arguments:
        query, key, value = empty(1, num_tokens, 48, 128).split([32, 8, 8], dim=2)
        cache = empty(4096, 32, 8, 128, dtype=cache_dtype)
        facts = {"sinks": None, "scale": 0.1, "causal": True, "sliding_window": None, "chunk_size": None}
        facts |= {"softcap": None, "slopes": None, "distance_logits": None, "key_cache": cache, "value_cache": cache}
        return {"query": query, "key": key, "value": value, **facts, **paged(num_tokens, num_sequences)}

    everything = {"sliding_window": 512, "softcap": 50.0, "sinks": empty(32), "slopes": empty(32)}
    in_8_bits = step(1, 1, torch.float8_e4m3fn), step(2048, 2, torch.float8_e4m3fn)
    return [step(1, 1), step(2048, 2) | everything, *in_8_bits]


def cached_mla() -> list[Arguments]:
    def step(num_tokens: int, num_sequences: int, cache_dtype: torch.dtype = torch.bfloat16) -> Arguments:
        latent, shared_key = empty(1, num_tokens, 576).split([512, 64], dim=2)
        given = {"query": empty(1, num_tokens, 128, 192), "latent": latent, "shared_key": shared_key}
        given |= {"up": empty(128 * 256, 512), "scale": 0.1}
        given["latent_cache"] = empty(4096, 32, 1, 576, dtype=cache_dtype)
        return given | paged(num_tokens, num_sequences)

    return [step(4, 4), step(4, 4, torch.float8_e4m3fn)]


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


def fp8_linear() -> list[Arguments]:
    def sample(rows: int, block_size: int | None) -> Arguments:
        weight = empty(7168, 4096, dtype=torch.float8_e4m3fn)
        blocks = (7168, 1) if block_size is None else (56, 32)
        scales = empty(*blocks, dtype=torch.float32)
        return {"x": empty(1, rows, 4096), "weight": weight, "scales": scales, "bias": None, "block_size": block_size}

    return [sample(1, None), sample(64, 128)]


def slots(num_sequences: int) -> Arguments:
    numbers = functools.partial(empty, dtype=torch.int32)
    return {"cu_seqlens": numbers(num_sequences + 1), "state_slots": numbers(num_sequences)}


def cached_causal_conv() -> list[Arguments]:
    weights = {"weight": empty(6144, 4), "bias": empty(6144), "activation": "silu", "window": empty(9, 3, 6144)}
    return [{"x": empty(1, tokens, 6144), **weights, **slots(1)} for tokens in (1, 1000)]


def cached_ssd() -> list[Arguments]:
    numbers = functools.partial(empty, dtype=torch.float32)
    heads = {name: numbers(64) for name in ("A", "D", "dt_bias")} | {"state": numbers(9, 64, 64, 128)}
    heads |= {"dt_softplus": True, "dt_min": 0.0, "dt_max": None}

    def step(num_tokens: int) -> Arguments:
        groups = empty(1, num_tokens, 8, 128)
        tokens = {"x": empty(1, num_tokens, 64, 64), "dt": empty(1, num_tokens, 64), "B": groups, "C": groups}
        return tokens | heads | slots(1)

    return [step(1), step(1000)]


def cached_selective_scan() -> list[Arguments]:
    x, entries = empty(1, 1, 8192), empty(1, 1, 16)
    numbers = functools.partial(empty, dtype=torch.float32)
    channels = {"A": numbers(8192, 16), "D": numbers(8192), "dt_bias": numbers(8192), "state": numbers(9, 8192, 16)}
    return [{"x": x, "dt": x, "B": entries, "C": entries, "z": x, "dt_softplus": True, **channels, **slots(1)}]


def cached_delta_rule() -> list[Arguments]:
    def step(num_tokens: int) -> Arguments:
        keys, decay = empty(1, num_tokens, 16, 128), empty(1, num_tokens, 32, dtype=torch.float32)
        tokens = {"query": keys, "key": keys, "value": empty(1, num_tokens, 32, 128), "beta": decay, "decay": decay}
        facts = {"scale": 0.1, "norm_eps": 1e-6, "state": empty(9, 32, 128, 128, dtype=torch.float32)}
        return tokens | facts | slots(1)

    return [step(1), step(1000)]


def cached_linear_attention() -> list[Arguments]:
    heads = empty(1, 1, 32, 128)  # chunks go through the kernel of the delta rule
    tokens = {name: heads for name in ("query", "key", "value", "decay")}
    return [{**tokens, "bonus": empty(32, 128), "state": empty(9, 32, 128, 128, dtype=torch.float32), **slots(1)}]


def cached_generalized_delta_rule() -> list[Arguments]:
    heads = empty(1, 1, 32, 64)
    tokens = {name: heads for name in ("query", "key", "value", "read", "write", "decay")}
    return [{**tokens, "state": empty(9, 32, 64, 64, dtype=torch.float32), **slots(1)}]


def cached_linear_recurrence() -> list[Arguments]:
    x = empty(1, 1, 2560)
    return [{"x": x, "gate": x, "state": empty(9, 2560, dtype=torch.float32), **slots(1)}]


def cached_wkv() -> list[Arguments]:
    x, channels = empty(1, 1, 2048), empty(2048)
    tokens = {"key": x, "value": x, "decay": channels, "bonus": channels}
    return [{**tokens, "memory": empty(9, 3, 2048, dtype=torch.float32), **slots(1)}]


def cached_mlstm() -> list[Arguments]:
    gate, keys = empty(1, 1, 8), empty(1, 1, 8, 256)
    tokens = {"query": keys, "key": keys, "value": empty(1, 1, 8, 512), "input_gate": gate, "forget_gate": gate}
    memory = empty(9, 8, 257, 513, dtype=torch.float32)
    return [{**tokens, "scale": 0.1, "eps": 1e-6, "memory": memory, **slots(1)}]


def cached_token_shift() -> list[Arguments]:
    lengths = empty(1, dtype=torch.int32)

    def step(num_tokens: int, distance: int) -> Arguments:
        shift = {"distance": distance, "first": None, "recent": empty(9, distance, 4096)}
        return {"x": empty(1, num_tokens, 4096), **shift, "seq_lens": lengths, **slots(1)}

    return [step(1, 1), step(100, 3)]


_GATE: Arguments = {"activation": "silu", "gated": True, "limit": None, "up_offset": 0.0}


def moe() -> list[Arguments]:
    def sample(num_tokens: int, **facts: Any) -> Arguments:
        routing = {"indices": empty(num_tokens, 8, dtype=torch.int64), "weights": empty(num_tokens, 8)}
        weights = {"gate_up": empty(128, 1536, 2048), "down": empty(128, 2048, 768)}
        biases = {"gate_up_bias": None, "down_bias": None}
        return {"x": empty(num_tokens, 2048), **routing, **weights, **biases, **_GATE, **facts}

    biases = {"gate_up_bias": empty(128, 1536), "down_bias": empty(128, 2048)}
    return [sample(1), sample(64, **biases, activation="quick_gelu", limit=7.0, up_offset=1.0)]


def expert_linear() -> list[Arguments]:
    indices = empty(64, 4, dtype=torch.int64)
    return [{"x": empty(64, 1, 2048), "indices": indices, "weight": empty(32, 4096, 2048), "bias": None}]


def quantized_moe() -> list[Arguments]:
    def packed(name: str, rows: int, columns: int, bits: int) -> Arguments:
        groups = columns // 32 if bits == 4 else 1
        scales = empty(128 * rows // 16, groups, 16, dtype=torch.float16)
        weight = empty(128 * rows // 16, columns // 32, bits, 16, 4, dtype=torch.uint8)
        offsets = scales if bits == 4 else None
        return {name: weight, f"{name}_scales": scales, f"{name}_offsets": offsets, f"{name}_bias": None}

    def sample(num_tokens: int, bits: int) -> Arguments:
        routing = {"indices": empty(num_tokens, 8, dtype=torch.int64), "weights": empty(num_tokens, 8)}
        weights = packed("gate_up", 1536, 2048, bits) | packed("down", 2048, 768, bits)
        return {"x": empty(num_tokens, 2048), "num_experts": 128, **routing, **weights, **_GATE}

    return [sample(1, 8), sample(64, 4)]


def nvfp4_linear() -> list[Arguments]:
    scales, one = empty(7168, 256, dtype=torch.float8_e4m3fn), empty(1, dtype=torch.float32)
    weight = {"weight": empty(7168, 2048, dtype=torch.uint8), "scales": scales, "tensor_scale": one, "bias": None}
    return [{"x": empty(1, rows, 4096), **weight} for rows in (1, 64)]


def fp8_moe() -> list[Arguments]:
    def numbers(name: str, rows: int, columns: int, block_size: int | None) -> Arguments:
        blocks = (128 * rows, 1) if block_size is None else (rows, columns // 128)
        weight = empty(128 * rows, columns, dtype=torch.float8_e4m3fn)
        return {name: weight, f"{name}_scales": empty(*blocks, dtype=torch.float32), f"{name}_bias": None}

    def sample(num_tokens: int, block_size: int | None) -> Arguments:
        routing = {"indices": empty(num_tokens, 8, dtype=torch.int64), "weights": empty(num_tokens, 8)}
        weights = numbers("gate_up", 1536, 2048, block_size) | numbers("down", 2048, 768, block_size)
        facts = {"num_experts": 128, "block_size": block_size}
        return {"x": empty(num_tokens, 2048), **facts, **routing, **weights, **_GATE}

    return [sample(1, None), sample(64, 128)]


def cached_sparse_attention() -> list[Arguments]:
    def step(num_tokens: int, num_sequences: int, index_heads: int, **facts: Any) -> Arguments:
        query, key, value = empty(1, num_tokens, 48, 128).split([32, 8, 8], dim=2)
        index = {"index_query": empty(1, num_tokens, index_heads, 128), "index_key": empty(1, num_tokens, 128)}
        caches = {"key_cache": empty(4096, 32, 8, 128), "value_cache": empty(4096, 32, 8, 128)}
        caches["index_key_cache"] = empty(4096, 32, 128)
        rest = {"sinks": None, "scale": 0.1, "local_blocks": 0, **facts, **paged(num_tokens, num_sequences)}
        return {"query": query, "key": key, "value": value, **index, **rest, **caches}

    by_token = {"index_weights": empty(1, 64, 32), "top_k": 512, "block_size": 1}
    by_block = {"index_weights": None, "top_k": 16, "block_size": 64, "local_blocks": 1, "sinks": empty(32)}
    return [step(64, 64, 32, **by_token), step(2048, 2, 4, **by_block)]


def nvfp4_moe() -> list[Arguments]:
    def numbers(name: str, rows: int, columns: int) -> Arguments:
        scales = empty(128 * rows, columns // 16, dtype=torch.float8_e4m3fn)
        weight = empty(128 * rows, columns // 2, dtype=torch.uint8)
        scale = empty(1, dtype=torch.float32)
        return {name: weight, f"{name}_scales": scales, f"{name}_tensor_scale": scale, f"{name}_bias": None}

    def sample(num_tokens: int) -> Arguments:
        routing = {"indices": empty(num_tokens, 8, dtype=torch.int64), "weights": empty(num_tokens, 8)}
        weights = numbers("gate_up", 1536, 2048) | numbers("down", 2048, 768)
        return {"x": empty(num_tokens, 2048), "num_experts": 128, **routing, **weights, **_GATE}

    return [sample(1), sample(64)]


def accept_drafts() -> list[Arguments]:
    numbers = functools.partial(empty, dtype=torch.int64)
    return [{"tokens": numbers(320), "drafts": numbers(320), "starts": numbers(65)}]


def choose_tokens() -> list[Arguments]:
    numbers = functools.partial(empty, dtype=torch.float32)

    def sample(rows: int, is_random: bool, is_filtered: bool) -> Arguments:
        draws = {"temperature": numbers(rows), "keys": empty(rows, dtype=torch.int64)}
        draws |= {"positions": empty(rows, dtype=torch.int64)}
        filters = {"top_k": empty(rows, dtype=torch.int32), "top_p": numbers(rows), "min_p": numbers(rows)}
        nothing = dict.fromkeys((*draws, *filters))
        given = (draws if is_random else {}) | (filters if is_filtered else {})
        return {"logits": empty(rows, 128256), **nothing, **given}

    return [sample(1, True, True), sample(256, True, False), sample(64, False, False)]


SIZES: dict[str, Callable[[], list[Arguments]]] = {
    "cached_attention": cached_attention,
    "cached_causal_conv": cached_causal_conv,
    "cached_delta_rule": cached_delta_rule,
    "cached_generalized_delta_rule": cached_generalized_delta_rule,
    "cached_linear_attention": cached_linear_attention,
    "cached_linear_recurrence": cached_linear_recurrence,
    "cached_mla": cached_mla,
    "cached_mlstm": cached_mlstm,
    "cached_selective_scan": cached_selective_scan,
    "cached_ssd": cached_ssd,
    "cached_token_shift": cached_token_shift,
    "cached_wkv": cached_wkv,
    "rms_norm": rms_norm,
    "add_rms_norm": add_rms_norm,
    "gated_rms_norm": gated_rms_norm,
    "layer_norm": layer_norm,
    "accept_drafts": accept_drafts,
    "choose_tokens": choose_tokens,
    "gated_activation": gated_activation,
    "rope": rope,
    "quantized_linear": quantized_linear,
    "moe": moe,
    "expert_linear": expert_linear,
    "quantized_moe": quantized_moe,
    "fp8_linear": fp8_linear,
    "fp8_moe": fp8_moe,
    "nvfp4_linear": nvfp4_linear,
    "nvfp4_moe": nvfp4_moe,
    "cached_sparse_attention": cached_sparse_attention,
}
