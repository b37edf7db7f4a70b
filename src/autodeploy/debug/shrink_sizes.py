"""How sizes shrink: a field's name and value go in, its value in a tiny config comes out.

A field is known by what its name means. Sizes of one sort shrink by one factor, so that what was equal stays equal
and what differed still differs; a value that no rule knows stays as it is.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

VOCAB_SIZE = 288
SPECIAL_IDS = 40
"""ids at the end of the vocabulary that special tokens are moved to; prompts stay below them"""
WIDTH = 64
HEADS = 4
HEAD_DIM, LARGE_HEAD_DIM = 16, 32
EXPERTS = 8
GROUPS = 4
WINDOW = 6
MAX_LENGTH = 256

_WIDTHS = ("hidden_size", "d_model", "n_embd", "dim_model", "embedding_dim", "emb_dim")
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "decoder_attention_heads")
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "kv_n_heads")
_HEAD_DIMS = ("qk_nope_head_dim", "head_dim", "dim_head", "d_head", "kv_channels")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_moe_experts")


@dataclass(frozen=True)
class Sizes:
    """The sizes of one config that its other fields are measured by.

    Attributes:
        values: all fields before shrinking.
        width, heads, kv_heads, head_dim, experts, groups: before; 0 where the config has none.
        tiny_width, tiny_heads, tiny_head_dim: after.
    """

    values: Mapping[str, Any]
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    experts: int
    groups: int
    tiny_width: int
    tiny_heads: int
    tiny_head_dim: int

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> "Sizes":
        def first(names: Sequence[str]) -> int:
            return next((values[name] for name in names if type(values.get(name)) is int), 0)

        width, heads = first(_WIDTHS), first(_HEADS)
        head_dim = first(_HEAD_DIMS) or (width // heads if heads else 0)
        is_large = heads * head_dim != width and (head_dim >= 256 or head_dim == LARGE_HEAD_DIM)
        is_state_space = "num_attention_heads" not in values and "expand" in values
        return cls(
            values=values,
            width=width,
            heads=heads,
            kv_heads=first(_KV_HEADS) or heads,
            head_dim=head_dim,
            experts=first(_EXPERTS),
            groups=first(("n_group", "num_expert_group")),
            tiny_width=WIDTH if "qk_dim_factor" not in values else 2 * WIDTH,  # narrowed, and rounded up to 64 again
            tiny_heads=int(values["expand"] * WIDTH) // HEAD_DIM if is_state_space else min(heads, HEADS) or HEADS,
            tiny_head_dim=LARGE_HEAD_DIM if is_large else HEAD_DIM,
        )

    def shrink(self, name: str, value: Any, *, differs: bool = False) -> Any:
        """The value of a field in the tiny config.

        Args:
            differs: the value holds for single layers and may differ from the config's own on purpose.
        """
        if isinstance(value, Mapping):
            is_rotary = name.startswith("rope_")
            return {key: self._rotary(key, value) if is_rotary else self.shrink(name, value[key]) for key in value}
        if isinstance(value, list | tuple) and re.search(r"token_(id|index)s?$", name):
            return type(value)(self.shrink(name, entry) for entry in value)
        if type(value) is not int or value <= 0:
            return value
        for pattern, rule in _RULES:
            if pattern.search(name):
                return rule(self, name, value, differs)
        return self.tiny_width if value == self.width and value > VOCAB_SIZE else value

    def per_layer(self, name: str, entries: Any) -> Any:
        """A list with one size per layer; other lists come back as they are."""
        if not isinstance(entries, list) or not entries or any(type(entry) is not int for entry in entries):
            return entries
        return [self.shrink(name.removesuffix("_per_layer"), entry, differs=True) for entry in entries]

    def _rotary(self, key: str, parameters: Mapping[str, Any]) -> Any:
        """Rotary parameters keep their meaning; lists with one number per pair of channels get shorter."""
        value = parameters[key]
        if isinstance(value, Mapping):
            return {inner: self._rotary(inner, value) for inner in value}
        if not isinstance(value, list | tuple) or len(value) < 2 or not self.head_dim:
            return value
        share = parameters.get("partial_rotary_factor") or self.values.get("partial_rotary_factor") or 1.0
        rope_dim = self.values.get("qk_rope_head_dim")
        rotary_dim = self.shrink("qk_rope_head_dim", rope_dim) if rope_dim else int(self.tiny_head_dim * share)
        pairs = max(1, rotary_dim // 2)
        if "section" not in key:
            return [value[at * len(value) // pairs] for at in range(pairs)]
        sections = [entry * pairs // sum(value) for entry in value]
        return [*sections[:-1], sections[-1] + pairs - sum(sections)]


def _multiple(value: float, of: int) -> int:
    return max(of, round(value / of) * of)


def _power_of_two(value: float) -> int:
    return 1 << max(0, int(value).bit_length() - 1)


def _width(sizes: Sizes, name: str, value: int, differs: bool) -> int:
    return _multiple(value * sizes.tiny_width / sizes.width, 8) if sizes.width else min(value, WIDTH)


def _same_width(sizes: Sizes, name: str, value: int, differs: bool) -> int:
    return WIDTH


def _head_dim(sizes: Sizes, name: str, value: int, differs: bool) -> int:
    if not sizes.head_dim or value == sizes.head_dim:
        return sizes.tiny_head_dim
    scaled = value * sizes.tiny_head_dim / sizes.head_dim
    return _multiple(scaled, 8 if scaled >= 8 else 4)


def _rank(sizes: Sizes, name: str, value: int, differs: bool) -> int:
    return min(value, 32 if name.startswith("q_") else 16)


def _heads(sizes: Sizes, name: str, value: int, differs: bool) -> int:
    if not sizes.heads or value == sizes.heads:
        return min(value, sizes.tiny_heads)
    return _power_of_two(sizes.tiny_heads * value / sizes.heads)


def _index_heads(sizes: Sizes, name: str, value: int, differs: bool) -> int:
    """Many stay many: a sum of few rectified scores is often zero, and which of many zeros are best is arbitrary."""
    return min(value, 16) if value > 8 else min(value, HEADS)


def _kv_heads(sizes: Sizes, name: str, value: int, differs: bool) -> int:
    if value == 1:
        return 1
    if value == sizes.heads:
        return sizes.tiny_heads
    if differs and value != sizes.kv_heads:
        main = _kv_heads(sizes, name, sizes.kv_heads, False)
        return min(sizes.tiny_heads, _power_of_two(main * value / sizes.kv_heads))
    return min(2, value)


def _experts(sizes: Sizes, name: str, value: int, differs: bool) -> int:
    if not sizes.experts or value >= sizes.experts:
        return min(value, EXPERTS)
    return max(1, round(value * EXPERTS / max(sizes.experts, EXPERTS)))


def _top_k(sizes: Sizes, name: str, value: int, differs: bool) -> int:
    if value == 1 or sizes.experts <= EXPERTS:
        return value
    return min(EXPERTS - 1, max(2, round(value * EXPERTS / sizes.experts)))


def _top_groups(sizes: Sizes, name: str, value: int, differs: bool) -> int:
    return value if sizes.groups <= GROUPS else max(1, round(value * GROUPS / sizes.groups))


def _value_heads(sizes: Sizes, name: str, value: int, differs: bool) -> int:
    return 2 * max(1, value // int(sizes.values["linear_num_key_heads"]))


def _value_head_dim(sizes: Sizes, name: str, value: int, differs: bool) -> int:
    return _multiple(HEAD_DIM * value / sizes.values["linear_key_head_dim"], 8)


def _state_space_heads(sizes: Sizes, name: str, value: int, differs: bool) -> int:
    expand = sizes.values.get("mamba_expand") or sizes.values.get("expand") or 2
    return min(value, int(expand * WIDTH) // HEAD_DIM)


def _state_space_width(sizes: Sizes, name: str, value: int, differs: bool) -> int:
    heads, head_dim = (sizes.shrink(field, sizes.values[field]) for field in ("mamba_n_heads", "mamba_d_head"))
    return int(heads * head_dim)


def _token_id(sizes: Sizes, name: str, value: int, differs: bool) -> int:
    first = VOCAB_SIZE - SPECIAL_IDS
    return value if value < first else first + value % SPECIAL_IDS


_Rule = Callable[[Sizes, str, int, bool], int]


def _at_most(limit: int) -> _Rule:
    return lambda sizes, name, value, differs: min(value, limit)


def _none(sizes: Sizes, name: str, value: int, differs: bool) -> int:
    return 0


_RULES: Sequence[tuple[re.Pattern[str], _Rule]] = [
    (re.compile(pattern), rule)
    for pattern, rule in (
        (r"token_(id|index)s?$", _token_id),
        (r"(nextn_predict|mtp(_num)?(_hidden)?)_layers$", _none),  # heads that draft further tokens
        (r"ngram_vocab|hash_\w*vocab", _at_most(128)),
        (r"vocab_size_divisible|split_\w*parts", _at_most(2)),
        (r"vocab_size", _at_most(VOCAB_SIZE)),
        # positions, and how far they reach
        (r"^(max_\w*positions?(_embeddings)?|n_positions|n_ctx|max_seq_len|context_length)$", _at_most(MAX_LENGTH)),
        (r"floor_scale|scaling_n_floor", _at_most(4)),
        (r"rel_extent|_max_distance$|num_buckets$", _at_most(16)),
        (r"sliding_window(_size)?$|^(attention_)?window(_size)?$|(attention_)window_size$|^local_attention",
         _at_most(WINDOW)),
        (r"^keep_window", _at_most(MAX_LENGTH)),  # tokens that are always kept: as a rule the whole context
        (r"attention_chunk_size|index\w*_topk$", _at_most(WINDOW)),
        (r"index\w*_(block_size|topk_blocks|compress_ratio)$|^compress_rates$", _at_most(4)),
        (r"index\w*_budget$", _at_most(8)),
        (r"index\w*_heads$", _index_heads),
        (r"index\w*_head_dim$", _at_most(HEAD_DIM)),
        # states and scans
        (r"(^|_)(d_state|state_size)$", _at_most(16)),
        (r"(dt_rank|time_step_rank)$", _at_most(8)),
        (r"^(mamba_)?(chunk|block)_size$|multiple_of$", _at_most(8)),
        (r"^(mamba_n_heads|n_mamba_heads|mamba_num_heads)$", _state_space_heads),
        (r"^mamba_d_ssm$", _state_space_width),
        (r"^mamba_\w*head_?(dim)?$|^linear_key_head_dim$|^linear_head_dim$", _at_most(HEAD_DIM)),
        (r"^(mamba_)?n_?groups$|^o_groups$|^linear_num_key_heads$", _at_most(2)),
        (r"^linear_num_value_heads$", _value_heads),
        (r"^linear_value_head_dim$", _value_head_dim),
        # experts
        (r"shared_experts$", _at_most(2)),
        (r"experts_per_tok(en)?$|^moe_(k|topk|top_k)$|^top_k_experts$", _top_k),
        (r"experts$|^zero_expert_num$", _experts),
        (r"^n_group$|^num_expert_group$", _at_most(GROUPS)),
        (r"^topk_group$", _top_groups),
        # attention
        (r"(key_value|kv_n|kv)_heads$", _kv_heads),
        (r"(^|_)n?_?heads?$", _heads),
        (r"lora_rank$", _rank),
        (r"head_(dim|size)$|^(dim_head|d_head|kv_channels|rotary_dim)$|^query_pre_attn_scalar$", _head_dim),
        (r"^d_rel$", _at_most(8)),
        # widths
        (r"^(out_hidden_size|hidden_size_global|adapter_(in|out)_dim|projector_(in|out)put_dim|vision_output_dim)$",
         _same_width),
        (r"(_|^)(low)?rank$|^router_hidden_size$|^hidden_size_per_layer_input$", _at_most(16)),
        (r"hidden_size|d_model|n_embd|dim_model|embed(ding)?_(dim|size)|emb_dim|embed_proj_dim|lru_width|input_size"
         r"|intermediate_size|ffn_(dim|hidden_size|size)|d_?ff$|dim_ff|d_inner|feed_forward|(expert|mlp)_dim", _width),
    )
]  # fmt: skip
"""the first pattern found in a field's name says how it shrinks"""
