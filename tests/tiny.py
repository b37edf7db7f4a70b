"""Tiny random models of many architectures, and a tokenizer for them: what tests use in place of a real checkpoint.

Each builder in `TINY` returns a float32 model in eval mode on the CPU, the same one every time, and so does each in
`HYBRID`, whose models have other token mixers beside attention. Weights are drawn wider than an initialiser would draw
them, so that attention attends, norms scale and logits are far from flat: with the usual 0.02 a model that ignores its
context altogether would pass most comparisons.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

VOCAB_SIZE = 288
MAX_LENGTH = 256
BOS, EOS, PAD = 256, 257, 258
HIDDEN = 48
WINDOW = 12

_SPECIAL_TOKENS = ["<|begin|>", "<|end|>", "<|pad|>"]
_CHAT_TEMPLATE = (
    "{% for message in messages %}<|begin|>{{ message['role'] }}\n{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|begin|>assistant\n{% endif %}"
)
_DECODER: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": HIDDEN,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": MAX_LENGTH,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}


def llama() -> PreTrainedModel:
    """RMSNorm, rotary, grouped queries, gated SiLU; untied head."""
    return _build("Llama", **_DECODER)


def qwen3() -> PreTrainedModel:
    """Norms on queries and keys, head size apart from hidden size, tied head."""
    return _build("Qwen3", **_DECODER, head_dim=16, tie_word_embeddings=True)


def gemma3_text() -> PreTrainedModel:
    """Sliding and full layers with their own rotary bases, offset norms before and after, scaled embeddings."""
    layers = {"layer_types": ["sliding_attention", "sliding_attention", "full_attention"], "sliding_window": WINDOW}
    return _build(
        "Gemma3", config="Gemma3Text", **_DECODER, head_dim=16, query_pre_attn_scalar=16, embedding_size=0.03, **layers
    )


def gemma2() -> PreTrainedModel:
    """Soft caps on scores and on logits, alternating windows."""
    # The caps are low, so that tiny logits and scores reach them.
    caps = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 0.5}
    heads = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": WINDOW}
    return _build("Gemma2", embedding_size=0.03, **_DECODER, **heads, **caps)


def phi3() -> PreTrainedModel:
    """Query, key and value in one matrix, gate and up in one matrix; rotary on part of each head."""
    return _build("Phi3", **_DECODER, partial_rotary_factor=0.5)


def mistral() -> PreTrainedModel:
    """A sliding window on every layer."""
    return _build("Mistral", **_DECODER, sliding_window=WINDOW)


def gpt2() -> PreTrainedModel:
    """Learned positions, LayerNorm with bias, fused transposed projections, plain GELU."""
    return _build(
        "GPT2",
        head="LMHeadModel",
        vocab_size=VOCAB_SIZE,
        n_embd=HIDDEN,
        n_layer=3,
        n_head=4,
        n_positions=MAX_LENGTH,
        bos_token_id=BOS,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )


def olmo2() -> PreTrainedModel:
    """Norms after attention and MLP, not before; full-width norms on queries and keys."""
    return _build("Olmo2", **_DECODER)


def granite() -> PreTrainedModel:
    """Multipliers on embeddings, attention, residuals and logits."""
    multipliers = {"embedding_multiplier": 3.0, "attention_multiplier": 0.2, "residual_multiplier": 0.5}
    return _build("Granite", **_DECODER, **multipliers, logits_scaling=2.0)


def smollm3() -> PreTrainedModel:
    """Layers without any position among rotary ones."""
    return _build("SmolLM3", **_DECODER, no_rope_layers=[1, 0, 1])


def cohere2() -> PreTrainedModel:
    """Attention and MLP side by side, LayerNorm without bias, windows with rotary and full layers without."""
    layers = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": WINDOW}
    return _build("Cohere2", **_DECODER, **layers, logit_scale=0.5)


def starcoder2() -> PreTrainedModel:
    """LayerNorm, biases everywhere, an MLP without a gate."""
    return _build("Starcoder2", **_DECODER, use_bias=True, sliding_window=None)


def gpt_oss(num_experts_per_tok: int = 2) -> PreTrainedModel:
    """Experts with biases, interleaved transposed weights and clamped gates; sinks, alternating windows."""
    experts = {"num_local_experts": 5, "num_experts_per_tok": num_experts_per_tok}
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": WINDOW, "head_dim": 16}
    return _build("GptOss", **_DECODER | {"num_hidden_layers": 2}, **experts, **layers)


_HYBRID: dict[str, Any] = _DECODER | {"num_hidden_layers": 4}


def jamba() -> PreTrainedModel:
    """Selective scans with norms on their inputs, and attention without positions."""
    layers = {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1}
    return _build("Jamba", **_HYBRID, **layers, mamba_d_state=8, mamba_dt_rank=6)


def bamba() -> PreTrainedModel:
    """Structured scans in groups of heads with a gated norm, and attention."""
    mixer = {"mamba_n_heads": 8, "mamba_d_head": 12, "mamba_n_groups": 2, "mamba_d_state": 8, "mamba_chunk_size": 8}
    return _build("Bamba", **_HYBRID, attn_layer_indices=[1, 3], **mixer)


def qwen3_next() -> PreTrainedModel:
    """Gated delta rule with fewer key heads than value heads, and gated attention; no experts."""
    heads = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "head_dim": 16, "full_attention_interval": 2}
    dims = {"linear_key_head_dim": 12, "linear_value_head_dim": 8}
    return _build("Qwen3Next", **_HYBRID, **heads, **dims, mlp_only_layers=[0, 1, 2, 3])


def kimi_linear() -> PreTrainedModel:
    """Delta rule with a decay per channel, and latent attention; no experts."""
    latent = {"q_lora_rank": None, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 12, "v_head_dim": 12}
    layers = {
        "layer_types": ["linear_attention", "full_attention"] * 2,
        "mlp_layer_types": ["dense"] * 4,
        "linear_num_heads": 4,
        "linear_head_dim": 12,
    }
    return _build("KimiLinear", **(_HYBRID | {"num_key_value_heads": 4}), **layers, **latent)


def qwen2_moe() -> PreTrainedModel:
    """Routed experts beside a shared one with a gate."""
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
    return _build("Qwen2Moe", **_DECODER, **experts, shared_expert_intermediate_size=64)


def deepseek_v3() -> PreTrainedModel:
    """Latent attention whose queries have a latent too; experts in groups, one of them shared, after a dense layer."""
    latent = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
    experts = {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 32}
    groups = {"n_group": 2, "topk_group": 1, "first_k_dense_replace": 1}
    return _build("DeepseekV3", **(_DECODER | {"num_key_value_heads": 4}), **latent, **experts, **groups)


def deepseek_v32() -> PreTrainedModel:
    """Latent attention to the few tokens that an indexer chooses, expanded before it; no experts."""
    latent = {"q_lora_rank": 24, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16}
    indexer = {"index_topk": 6, "index_n_heads": 2, "index_head_dim": 16, "head_dim": 8}
    layers = {"num_key_value_heads": 4, "num_hidden_layers": 2, "mlp_layer_types": ["dense"] * 2}
    return _build("DeepseekV32", **(_DECODER | layers), **latent, **indexer)


def lfm3() -> PreTrainedModel:
    """Short convolutions, sliding windows and full attention: states of every kind in one model."""
    layers = ["conv", "sliding_attention", "conv", "full_attention"]
    return _build("Lfm3", **_HYBRID, layer_types=layers, sliding_window=WINDOW)


HYBRID: dict[str, Callable[[], PreTrainedModel]] = {
    builder.__name__: builder for builder in (jamba, bamba, qwen3_next, kimi_linear, lfm3)
}

TINY: dict[str, Callable[[], PreTrainedModel]] = {
    builder.__name__: builder
    for builder in (
        llama,
        qwen3,
        gemma3_text,
        gemma2,
        phi3,
        mistral,
        gpt2,
        olmo2,
        granite,
        smollm3,
        cohere2,
        starcoder2,
        gpt_oss,
    )
}


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte and three special ones: every text survives the round trip, emoji and all."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    raw = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    raw.add_special_tokens(_SPECIAL_TOKENS)
    begin, end, pad = _SPECIAL_TOKENS
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token=begin, eos_token=end, pad_token=pad, chat_template=_CHAT_TEMPLATE
    )


def save(name: str, folder: Path) -> Path:
    """Write `TINY[name]` and the tokenizer as a checkpoint folder; returns the folder."""
    TINY[name]().save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def prompts(count: int, seed: int = 0, shortest: int = 1, longest: int = 40) -> list[list[int]]:
    """Prompts of random ids, none of them special, with lengths spread over `shortest..longest` tokens."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest + 1, (count,), generator=generator).tolist()
    return [torch.randint(0, BOS, (length,), generator=generator).tolist() for length in lengths]


def _build(
    name: str, config: str | None = None, head: str = "ForCausalLM", embedding_size: float = 0.1, **fields: Any
) -> PreTrainedModel:
    config_class: type[PreTrainedConfig] = getattr(transformers, f"{config or name}Config")
    with torch.random.fork_rng(devices=[]):  # initialisers draw from the global generator
        torch.manual_seed(0)
        model: PreTrainedModel = getattr(transformers, f"{name}{head}")(config_class(**fields)).eval()
    model.generation_config = GenerationConfig(bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD)
    _draw_weights(model, embedding_size, torch.Generator().manual_seed(sum(map(ord, name))))
    return model.requires_grad_(False)


@torch.no_grad()
def _draw_weights(model: PreTrainedModel, embedding_size: float, generator: torch.Generator) -> None:
    """Matrices with a gain of about 2; norms and biases near where the initialiser puts them.

    Embeddings stay small beside what the layers add to them: else a model whose head is its embedding would say its
    last token again for ever, and greedy outputs would compare nothing.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, torch.nn.Embedding)}
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1:
            parameter += 0.1 * noise
        else:
            parameter.copy_(noise * (embedding_size if id(parameter) in embeddings else 0.3))
