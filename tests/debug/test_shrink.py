"""A shrunk config is small, builds, and keeps everything that decides which code runs."""

from typing import Any

import pytest
import torch
import transformers
from transformers import PreTrainedConfig

from autodeploy.debug.shrink import shrink, tiny_model
from autodeploy.debug.shrink_sizes import SPECIAL_IDS, VOCAB_SIZE
from autodeploy.errors import UnsupportedModelError


def config_of(name: str, **fields: Any) -> PreTrainedConfig:
    config: PreTrainedConfig = getattr(transformers, f"{name}Config")(**fields)
    return config


@pytest.mark.parametrize(
    "name",
    ["Llama", "GPT2", "Mixtral", "Gemma3Text", "DeepseekV3", "GptOss", "Mamba2", "Jamba", "Qwen3Next", "Zamba2"],
)
def test_a_tiny_model_of_a_real_config_runs_and_its_context_matters(name: str) -> None:
    config = config_of(name)
    before = config.to_dict()
    model = tiny_model(shrink(config))
    assert config.to_dict() == before
    assert sum(p.numel() for p in model.parameters()) < 2_000_000
    assert {p.dtype for p in model.parameters()} == {torch.float32} and not model.training
    ids = torch.randint(0, VOCAB_SIZE - SPECIAL_IDS, (1, 11), generator=torch.Generator().manual_seed(0))
    other = ids.clone()
    other[0, 8] = (ids[0, 8] + 1) % 100
    a, b = (model(x, use_cache=False).logits[0] for x in (ids, other))
    assert a.isfinite().all() and torch.allclose(a[:8], b[:8], atol=1e-4)
    scale = a.std()
    assert (a[10] - b[10]).abs().max() > 0.1 * scale, "the logits two tokens later do not see the change"
    top = a.topk(2).values
    assert ((top[:, 0] - top[:, 1]) > 1e-4 * scale).all(), "greedy would compare ties"


def test_seeds() -> None:
    config = shrink(config_of("Llama"))
    first, again, other = (tiny_model(config, seed).lm_head.weight for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_every_kind_of_layer_stays_in_order() -> None:
    tiny = shrink(config_of("Gemma3Text"))  # five sliding, one full, and so on
    assert tiny.layer_types == ["sliding_attention", "full_attention"]
    assert tiny.sliding_window == 6 and tiny.num_hidden_layers == 2
    shared = shrink(config_of("Gemma3nText"))  # the last 15 of 35 layers reuse keys and values of earlier ones
    kinds = list(shared.layer_types)
    assert set(kinds[: -shared.num_kv_shared_layers]) == set(kinds[-shared.num_kv_shared_layers :]) == set(kinds)


def test_counts_of_first_layers_and_lists_agree() -> None:
    tiny = shrink(config_of("ExaoneMoe"))
    assert list(zip(tiny.layer_types, tiny.mlp_layer_types, strict=True)) == [
        ("sliding_attention", "dense"),
        ("sliding_attention", "sparse"),
        ("full_attention", "sparse"),
    ]
    assert shrink(config_of("DeepseekV3", first_k_dense_replace=5)).first_k_dense_replace == 1


def test_kinds_that_a_period_makes_keep_the_period() -> None:
    config = config_of("Jamba")  # attention in layer 4 of every 8, experts in every second
    tiny = shrink(config)
    kinds = set(zip(config.layers_block_type, config.layers_num_experts, strict=True))
    assert len(kinds) == 3 and tiny.num_hidden_layers == 5
    small = {experts: min(experts, 8) for experts in (1, 16)}
    wanted = {(block, small[experts]) for block, experts in kinds}
    assert set(zip(tiny.layers_block_type, tiny.layers_num_experts, strict=True)) == wanted


def test_lists_of_layer_numbers_are_renumbered() -> None:
    tiny = shrink(config_of("Bamba", attn_layer_indices=[9, 18, 27]))
    assert tiny.layers_block_type == ["linear_attention", "full_attention"] and tiny.attn_layer_indices == [1]
    tiny = shrink(config_of("Llama4Text", interleave_moe_layer_step=2))
    assert tiny.moe_layers == [at for at in range(tiny.num_hidden_layers) if at in tiny.moe_layers] != []
    assert 0 not in tiny.moe_layers


def test_ratios_stay() -> None:
    def heads(**fields: int) -> tuple[int, int]:
        tiny = shrink(config_of("Llama", num_attention_heads=32, **fields))
        return tiny.num_attention_heads, tiny.num_key_value_heads

    assert [heads(num_key_value_heads=n) for n in (32, 8, 1)] == [(4, 4), (4, 2), (4, 1)]
    experts = shrink(config_of("DeepseekV3"))
    assert (experts.n_routed_experts, experts.num_experts_per_tok) == (8, 2)
    assert (experts.n_group, experts.topk_group) == (4, 2)
    linear = shrink(config_of("OlmoHybrid"))
    assert linear.linear_value_head_dim == 2 * linear.linear_key_head_dim


def test_what_single_layers_have_of_their_own_stays_their_own() -> None:
    config = config_of("Gemma4Text")
    tiny = shrink(config)
    sizes = [(layer.head_dim, layer.num_key_value_heads) for layer in tiny.per_layer_config]
    original = {(layer.head_dim, layer.num_key_value_heads) for layer in config.per_layer_config}
    assert len(set(sizes)) == len(original) > 1
    few = config_of("Laguna", num_hidden_layers=4, num_attention_heads_per_layer=[48, 24, 48, 24])
    assert shrink(few).num_attention_heads_per_layer == [4, 2, 4]  # and a dense layer before those with experts


def test_rotary_lists_fit_the_smaller_heads() -> None:
    factors = [1.0 + at / 48 for at in range(48)]
    config = config_of(
        "Phi3",
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, "short_factor": factors, "long_factor": factors},
    )
    tiny = shrink(config)
    assert len(tiny.rope_parameters["short_factor"]) == tiny.hidden_size // tiny.num_attention_heads // 2
    tiny_model(tiny)(torch.tensor([[1, 2, 3]]))


def test_switches_and_absent_parts_stay_as_they_are() -> None:
    tiny = shrink(config_of("Qwen2"))
    assert not tiny.use_sliding_window and tiny.sliding_window is None
    tiny = shrink(
        config_of("Llama", tie_word_embeddings=True, hidden_act="gelu", rms_norm_eps=1e-3, eos_token_id=99999)
    )
    assert tiny.tie_word_embeddings and tiny.hidden_act == "gelu" and tiny.rms_norm_eps == 1e-3
    assert VOCAB_SIZE - SPECIAL_IDS <= tiny.eos_token_id < VOCAB_SIZE


def test_shrinking_a_tiny_config_again_changes_nothing() -> None:
    for name in ("Llama", "Qwen3Next", "DeepseekV3"):
        tiny = shrink(config_of(name))
        assert shrink(tiny).to_dict() == tiny.to_dict()


def test_a_config_without_a_language_model_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="vit"):
        tiny_model(shrink(config_of("ViT")))
