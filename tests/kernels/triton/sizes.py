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


def paged(num_tokens: int, num_sequences: int, num_pages: int = 1024) -> Arguments:
    """Batch inputs with room for 32768 tokens of each sequence in pages of 32."""
    numbers = functools.partial(empty, dtype=torch.int32)
    tables = {"seq_lens": numbers(num_sequences), "page_table": numbers(num_sequences, num_pages)}
    return {"cu_seqlens": numbers(num_sequences + 1), **tables, "slot_mapping": empty(num_tokens, dtype=torch.int64)}


def attention_step(
    num_tokens: int,
    num_sequences: int,
    heads: tuple[int, int] = (32, 8),
    width: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    cache_dtype: torch.dtype | None = None,
    **facts: Any,
) -> Arguments:
    num_heads, num_kv_heads = heads
    row = empty(1, num_tokens, num_heads + 2 * num_kv_heads, width, dtype=dtype)
    query, key, value = row.split([num_heads, num_kv_heads, num_kv_heads], dim=2)
    cache = empty(4096, 32, num_kv_heads, width, dtype=cache_dtype or dtype)
    plain = {"sinks": None, "scale": 0.1, "causal": True, "sliding_window": None, "chunk_size": None}
    plain |= {"softcap": None, "slopes": None, "distance_logits": None, "key_cache": cache, "value_cache": cache}
    return {"query": query, "key": key, "value": value, **plain, **facts, **paged(num_tokens, num_sequences)}


def cached_attention() -> list[Arguments]:
    everything = {"sliding_window": 512, "softcap": 50.0, "sinks": empty(32), "slopes": empty(32)}
    in_8_bits = [attention_step(*step, cache_dtype=torch.float8_e4m3fn) for step in ((1, 1), (2048, 2))]
    return [attention_step(1, 1), attention_step(2048, 2, **everything), *in_8_bits]


def more_attention() -> list[Arguments]:
    """Steps of a few tokens each, other sizes of heads, and float32, whose products are unrolled."""
    with_sinks: Arguments = {"heads": (64, 8), "width": 64, "sinks": empty(64), "sliding_window": 128}
    wide: Arguments = {"heads": (16, 2), "width": 256}
    many: Arguments = {"heads": (128, 1)}
    steps = [(64, 64), (64, 8), (256, 8), (2048, 2)]
    given = [attention_step(*step, **facts) for step in steps for facts in ({}, with_sinks, wide, many)]
    given += [attention_step(*step, dtype=torch.float16) for step in steps]
    given += [attention_step(*step, dtype=torch.float32) for step in ((1, 1), (2048, 2))]
    given += [attention_step(*step, **wide, cache_dtype=torch.float8_e5m2) for step in steps]
    given += [attention_step(2048, 2, causal=False), attention_step(2048, 2, chunk_size=8192)]
    return [*given, attention_step(2048, 2, distance_logits=empty(1, 2048, 32, 128))]


def latents(
    num_tokens: int,
    num_sequences: int,
    num_heads: int = 128,
    dtype: torch.dtype = torch.bfloat16,
    cache_dtype: torch.dtype | None = None,
) -> Arguments:
    latent, shared_key = empty(1, num_tokens, 576, dtype=dtype).split([512, 64], dim=2)
    given = {"query": empty(1, num_tokens, num_heads, 192, dtype=dtype), "latent": latent, "shared_key": shared_key}
    given |= {"up": empty(num_heads * 256, 512, dtype=dtype), "scale": 0.1}
    given["latent_cache"] = empty(4096, 32, 1, 576, dtype=cache_dtype or dtype)
    return given | paged(num_tokens, num_sequences)


def turned_step(num_tokens: int, num_sequences: int, rotary_dim: int = 128, **facts: Any) -> Arguments:
    angles = empty(1, num_tokens, rotary_dim)
    return attention_step(num_tokens, num_sequences, **facts) | {"cos": angles, "sin": angles}


def cached_rope_attention() -> list[Arguments]:
    return [turned_step(1, 1), turned_step(2048, 2, 64, cache_dtype=torch.float8_e4m3fn)]


def cached_mla() -> list[Arguments]:
    return [latents(1, 1), latents(4, 4, cache_dtype=torch.float8_e4m3fn)]


def more_mla() -> list[Arguments]:
    """Chunks of prompts, and few heads."""
    given = [latents(*step, num_heads=heads) for step in ((64, 64), (2048, 2)) for heads in (16, 128)]
    return [*given, latents(2048, 2, cache_dtype=torch.float8_e5m2), latents(2048, 2, dtype=torch.float16)]


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


def scan_step(
    num_tokens: int, heads: int = 64, groups: int = 8, entries: int = 128, dtype: torch.dtype = torch.bfloat16
) -> Arguments:
    numbers = functools.partial(empty, dtype=torch.float32)
    given = {name: numbers(heads) for name in ("A", "D", "dt_bias")} | {"state": numbers(9, heads, 64, entries)}
    given |= {"dt_softplus": True, "dt_min": 0.0, "dt_max": None}
    given |= {name: empty(1, num_tokens, groups, entries, dtype=dtype) for name in ("B", "C")}
    given |= {"x": empty(1, num_tokens, heads, 64, dtype=dtype), "dt": empty(1, num_tokens, heads, dtype=dtype)}
    return given | slots(1)


def cached_ssd() -> list[Arguments]:
    return [scan_step(1), scan_step(1000)]


def more_ssd() -> list[Arguments]:
    """The most entries that are taken, one group, and float16."""
    sizes: list[Arguments] = [{"entries": 256, "groups": 1}, {"dtype": torch.float16}]
    return [scan_step(count, **facts) for count in (1, 1000) for facts in sizes]


def cached_selective_scan() -> list[Arguments]:
    x, entries = empty(1, 1, 8192), empty(1, 1, 16)
    numbers = functools.partial(empty, dtype=torch.float32)
    channels = {"A": numbers(8192, 16), "D": numbers(8192), "dt_bias": numbers(8192), "state": numbers(9, 8192, 16)}
    return [{"x": x, "dt": x, "B": entries, "C": entries, "z": x, "dt_softplus": True, **channels, **slots(1)}]


def delta_step(num_tokens: int, dtype: torch.dtype = torch.bfloat16) -> Arguments:
    keys, values = empty(1, num_tokens, 16, 128, dtype=dtype), empty(1, num_tokens, 32, 128, dtype=dtype)
    decay = empty(1, num_tokens, 32, dtype=torch.float32)
    tokens = {"query": keys, "key": keys, "value": values, "beta": decay, "decay": decay}
    facts = {"scale": 0.1, "norm_eps": 1e-6, "state": empty(9, 32, 128, 128, dtype=torch.float32)}
    return tokens | facts | slots(1)


def cached_delta_rule() -> list[Arguments]:
    return [delta_step(1), delta_step(1000)]


def more_delta_rule() -> list[Arguments]:
    return [delta_step(count, torch.float16) for count in (1, 1000)]


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


def mixture(
    num_tokens: int,
    experts: int = 128,
    size: int = 2048,
    width: int = 768,
    *,
    has_biases: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    **facts: Any,
) -> Arguments:
    gate = _GATE | facts
    rows = 2 * width if gate["gated"] else width
    make = functools.partial(empty, dtype=dtype)
    routing = {"indices": empty(num_tokens, 8, dtype=torch.int64), "weights": make(num_tokens, 8)}
    given = {"x": make(num_tokens, size), "gate_up": make(experts, rows, size), "down": make(experts, size, width)}
    given |= {"gate_up_bias": make(experts, rows), "down_bias": make(experts, size)} if has_biases else _NO_BIASES
    return {**given, **routing, **gate}


_NO_BIASES: Arguments = {"gate_up_bias": None, "down_bias": None}
_CLAMPED: Arguments = {"has_biases": True, "activation": "quick_gelu", "limit": 7.0, "up_offset": 1.0}


def moe() -> list[Arguments]:
    return [mixture(1), mixture(64, **_CLAMPED)]


def more_moe() -> list[Arguments]:
    """Sizes that are no multiples of 128, experts without a gate, and float16."""
    sizes: list[Arguments] = [
        {"experts": 32, "size": 2880, "width": 2880, **_CLAMPED},
        {"size": 2688, "width": 1856, "activation": "relu2", "gated": False},
        {"dtype": torch.float16},
    ]
    return [mixture(count, **facts) for count in (1, 64) for facts in sizes]


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


def indexed_step(num_tokens: int, num_sequences: int, index_heads: int, **facts: Any) -> Arguments:
    query, key, value = empty(1, num_tokens, 48, 128).split([32, 8, 8], dim=2)
    index = {"index_query": empty(1, num_tokens, index_heads, 128), "index_key": empty(1, num_tokens, 128)}
    caches = {"key_cache": empty(4096, 32, 8, 128), "value_cache": empty(4096, 32, 8, 128)}
    caches["index_key_cache"] = empty(4096, 32, 128)
    rest = {"sinks": None, "scale": 0.1, "local_blocks": 0, **facts, **paged(num_tokens, num_sequences)}
    return {"query": query, "key": key, "value": value, **index, **rest, **caches}


def chosen_tokens(num_tokens: int, num_sequences: int) -> Arguments:
    facts = {"index_weights": empty(1, num_tokens, 32), "top_k": 512, "block_size": 1}
    return indexed_step(num_tokens, num_sequences, 32, **facts)


def cached_sparse_attention() -> list[Arguments]:
    by_block = {"index_weights": None, "top_k": 16, "block_size": 64, "local_blocks": 1, "sinks": empty(32)}
    return [chosen_tokens(64, 64), indexed_step(2048, 2, 4, **by_block)]


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


def in_float16(make: Callable[[], list[Arguments]]) -> Callable[[], list[Arguments]]:
    """The same arguments, with activations in float16."""
    return lambda: [{**given, "x": given["x"].half()} for given in make()]


def more_choices() -> list[Arguments]:
    """Rows whose logits penalties have made float32."""
    return [{**given, "logits": given["logits"].float()} for given in choose_tokens()]


SIZES: dict[str, Callable[[], list[Arguments]]] = {
    "cached_attention": cached_attention,
    "cached_causal_conv": cached_causal_conv,
    "cached_delta_rule": cached_delta_rule,
    "cached_generalized_delta_rule": cached_generalized_delta_rule,
    "cached_linear_attention": cached_linear_attention,
    "cached_linear_recurrence": cached_linear_recurrence,
    "cached_mla": cached_mla,
    "cached_mlstm": cached_mlstm,
    "cached_rope_attention": cached_rope_attention,
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
"""By op, what is compiled in every run of the tests."""

MORE: dict[str, Callable[[], list[Arguments]]] = {
    "cached_attention": more_attention,
    "cached_delta_rule": more_delta_rule,
    "cached_mla": more_mla,
    "cached_ssd": more_ssd,
    "choose_tokens": more_choices,
    "fp8_linear": in_float16(fp8_linear),
    "fp8_moe": in_float16(fp8_moe),
    "moe": more_moe,
    "nvfp4_linear": in_float16(nvfp4_linear),
    "nvfp4_moe": in_float16(nvfp4_moe),
    "quantized_linear": in_float16(quantized_linear),
    "quantized_moe": in_float16(quantized_moe),
}
"""The same for slow tests."""

ROWS = (1, 2, 3, 5, 8, 16, 48, 64, 100)
PAGES = (1, 7, 16, 100, 1024)


def with_rows(make: Callable[[], list[Arguments]], *names: str) -> Callable[[], list[Arguments]]:
    """The last arguments of an op, with each number of rows `[1, rows, ...]` in the tensors of these names."""

    def steps() -> list[Arguments]:
        given = make()[-1]
        return [given | {name: empty(1, rows, *given[name].shape[2:]) for name in names} for rows in ROWS]

    return steps


def decode_steps(make: Callable[[int, int], Arguments]) -> Callable[[], list[Arguments]]:
    """Steps of one token per sequence, for each number of sequences and width of page tables."""
    return lambda: [make(rows, rows) | paged(rows, rows, pages) for rows in ROWS for pages in PAGES]


STEPS: dict[str, Callable[[], list[Arguments]]] = {
    "add_rms_norm": with_rows(add_rms_norm, "x", "residual"),
    "cached_attention": decode_steps(attention_step),
    "cached_mla": decode_steps(latents),
    "cached_rope_attention": decode_steps(turned_step),
    "cached_sparse_attention": decode_steps(chosen_tokens),
    "fp8_linear": with_rows(fp8_linear, "x"),
    "gated_activation": with_rows(gated_activation, "gate_up"),
    "gated_rms_norm": with_rows(gated_rms_norm, "x", "gate"),
    "layer_norm": with_rows(layer_norm, "x"),
    "moe": lambda: [mixture(rows) for rows in ROWS],
    "nvfp4_linear": with_rows(nvfp4_linear, "x"),
    "quantized_linear": with_rows(quantized_linear, "x"),
    "rope": with_rows(rope, "query", "key", "cos", "sin"),
}
"""Steps that differ in what differs while one model is served."""
