from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, CLIPVisionConfig, DeepseekV3Config, LlamaConfig, PreTrainedConfig

from autodeploy.errors import UnsupportedModelError
from autodeploy.models import instantiate as module
from autodeploy.models.instantiate import instantiate
from tests.tiny import TINY


@pytest.mark.parametrize("name", TINY)
def test_is_the_model_of_the_config_without_weights(name: str) -> None:
    reference = TINY[name]()
    model = instantiate(reference.config, dtype=torch.float32)
    assert type(model) is type(reference) and not model.training
    parameters = dict(model.named_parameters(remove_duplicate=False))
    wanted = dict(reference.named_parameters(remove_duplicate=False))
    assert {name: p.shape for name, p in parameters.items()} == {name: p.shape for name, p in wanted.items()}
    assert all(p.is_meta and not p.requires_grad and p.dtype == torch.float32 for p in parameters.values())


@pytest.mark.parametrize("name", TINY)
def test_buffers_are_real_and_computed(name: str) -> None:
    config = TINY[name]().config
    reference = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    buffers = dict(instantiate(config, dtype=torch.bfloat16).named_buffers())
    for buffer_name, want in reference.named_buffers():
        assert torch.equal(buffers[buffer_name], want) and buffers[buffer_name].dtype == want.dtype, buffer_name


def test_works_once_weights_are_put_in() -> None:
    reference = TINY["gemma3_text"]()
    model = instantiate(reference.config, dtype=torch.float32)
    model.load_state_dict(reference.state_dict(), assign=True)
    ids = torch.arange(20)[None]
    assert torch.equal(model(ids).logits, reference(ids).logits)


def test_tied_weights_are_one_object_and_others_are_not() -> None:
    tied = instantiate(TINY["qwen3"]().config, dtype=torch.bfloat16)
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    untied = instantiate(TINY["llama"]().config, dtype=torch.bfloat16)
    assert untied.lm_head.weight is not untied.model.embed_tokens.weight


def test_the_config_is_not_changed() -> None:
    config = TINY["llama"]().config
    before = config.to_dict()
    instantiate(config, dtype=torch.float16)
    assert config.to_dict() == before


def test_weights_that_the_class_keeps_in_float32_are_float32(tmp_path: Path) -> None:
    config = DeepseekV3Config(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=2,
        moe_intermediate_size=8, kv_lora_rank=8, q_lora_rank=8, qk_rope_head_dim=4, v_head_dim=4, qk_nope_head_dim=4,
        first_k_dense_replace=1,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    wanted = {name: tensor.dtype for name, tensor in loaded.state_dict().items()}
    assert set(wanted.values()) == {torch.float32, torch.bfloat16}
    model = instantiate(config, dtype=torch.bfloat16)
    assert {name: tensor.dtype for name, tensor in model.state_dict().items()} == wanted


def test_seventy_billion_parameters_cost_no_memory() -> None:
    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=8192,
        intermediate_size=28672,
        num_hidden_layers=80,
        num_attention_heads=64,
        num_key_value_heads=8,
    )
    before = _peak_bytes()
    model = instantiate(config, dtype=torch.bfloat16)
    assert sum(parameter.numel() for parameter in model.parameters()) > 70e9
    assert _peak_bytes() - before < 2**30


def test_a_weight_larger_than_the_machine_is_never_reserved() -> None:
    with module.init_empty_weights(include_buffers=False), module._LargeOnMeta():
        linear = nn.Linear(2**23, 2**23, bias=False)  # 256 TiB
        zeros, ones = nn.Parameter(torch.zeros(2**23, 2**23)), nn.Parameter(torch.ones(2**23, 2**23))
        table = torch.zeros(4096, 4096)
        small = torch.empty(4)
        on_purpose = torch.empty(2, 2, device="cpu")
    assert linear.weight.is_meta and zeros.is_meta and ones.is_meta and not table.is_meta
    assert not small.is_meta and not on_purpose.is_meta


def test_a_lost_buffer_is_named() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].register_buffer("kept", torch.empty(3, device="meta"))
    module._require_real_buffers(model)
    assert torch.equal(model[0].kept, torch.zeros(3))
    model[0].register_buffer("table", torch.empty(3, device="meta"), persistent=False)
    with pytest.raises(UnsupportedModelError, match=r"buffer 0\.table"):
        module._require_real_buffers(model)


def test_a_config_that_is_no_language_model_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="'clip_vision_model'"):
        instantiate(CLIPVisionConfig(), dtype=torch.float32)


def test_own_code_is_suggested_but_not_run() -> None:
    class HomeMade(PreTrainedConfig):
        model_type = "home-made"

    config = HomeMade(auto_map={"AutoModelForCausalLM": "home_made.HomeMade"})
    with pytest.raises(UnsupportedModelError, match=r"(?s)'home-made'.*runs only with trust_remote_code=True"):
        instantiate(config, dtype=torch.float32)


def _peak_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
