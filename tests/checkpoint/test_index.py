import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DeepseekV3Config,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from autodeploy.checkpoint.files import StoredTensors, find_weight_files
from autodeploy.checkpoint.index import CheckpointIndex, DummyReader, ModuleReader
from autodeploy.errors import CheckpointError
from autodeploy.models.instantiate import instantiate
from tests.tiny import TINY

DECODER = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
EXPERTS: dict[str, PreTrainedConfig] = {
    "experts stored one by one": MixtralConfig(**DECODER, num_local_experts=4),
    "and weights that stay float32": DeepseekV3Config(
        **DECODER,
        n_routed_experts=4,
        n_group=1,
        topk_group=1,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=8,
        v_head_dim=8,
        qk_nope_head_dim=8,
        first_k_dense_replace=1,
    ),
}


@pytest.fixture(autouse=True)
def _quiet_transformers() -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()


def open_index(folder: Path, dtype: torch.dtype = torch.float32) -> CheckpointIndex:
    return CheckpointIndex(
        StoredTensors(find_weight_files(folder)), instantiate(AutoConfig.from_pretrained(folder), dtype=dtype)
    )


def assert_reads_what_transformers_loads(folder: Path, dtype: torch.dtype = torch.float32) -> CheckpointIndex:
    reference: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    index = open_index(folder, dtype)
    assert index.check() == ()
    for name, want in reference.state_dict().items():
        assert torch.equal(index.read(name).to(want.dtype), want), name
    return index


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3_text", "phi3", "gpt2"])
def test_reads_what_transformers_loads(tmp_path: Path, name: str) -> None:
    TINY[name]().save_pretrained(tmp_path)
    assert_reads_what_transformers_loads(tmp_path)


@pytest.mark.parametrize("name", EXPERTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_reads_stacked_experts(tmp_path: Path, name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(EXPERTS[name], dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert len(stored) > len(model.state_dict()), "the checkpoint should hold experts one by one"
    assert_reads_what_transformers_loads(tmp_path, dtype)


def test_reads_shards(tmp_path: Path) -> None:
    TINY["llama"]().save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(find_weight_files(tmp_path)) > 2
    assert_reads_what_transformers_loads(tmp_path)


def test_reads_a_pickled_state_dict(tmp_path: Path) -> None:
    model = TINY["qwen3"]()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    index = open_index(tmp_path)
    assert index.check() == ()  # a tied weight stored under both its names is no contradiction
    assert torch.equal(index.read("lm_head.weight"), model.lm_head.weight)


def test_reads_a_checkpoint_of_the_base_model(tmp_path: Path) -> None:
    """Without head, and without the prefix that the head's class puts before every name."""
    model = TINY["qwen3"]()
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    save_file({name.removeprefix("model."): tensor for name, tensor in stored.items()}, tmp_path / "model.safetensors")
    index = assert_reads_what_transformers_loads(tmp_path)
    assert torch.equal(index.read("lm_head.weight"), model.get_input_embeddings().weight)


def test_a_tied_weight_may_be_stored_under_either_name(tmp_path: Path) -> None:
    model = TINY["qwen3"]()
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    stored["lm_head.weight"] = stored.pop("model.embed_tokens.weight")
    save_file(stored, tmp_path / "model.safetensors")
    index = open_index(tmp_path)
    assert index.check() == ()
    assert torch.equal(index.read("model.embed_tokens.weight"), model.lm_head.weight)


def test_a_tie_that_the_values_contradict_is_refused(tmp_path: Path) -> None:
    TINY["qwen3"]().save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    stored["lm_head.weight"] = stored["model.embed_tokens.weight"] + 1
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        open_index(tmp_path).check()


def test_nothing_is_read_before_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    TINY["llama"]().save_pretrained(tmp_path)
    index = open_index(tmp_path)
    read: list[str] = []
    real_read = StoredTensors.read
    monkeypatch.setattr(StoredTensors, "read", lambda self, name: read.append(name) or real_read(self, name))
    index.check()
    assert read == []
    index.read("model.norm.weight")
    assert read == ["model.norm.weight"]


def test_names_of_tensors_that_are_stored_as_they_are(tmp_path: Path) -> None:
    TINY["llama"]().save_pretrained(tmp_path)
    names = ["model.norm.weight", "model.layers.0.mlp.up_proj.weight"]
    assert open_index(tmp_path).stored_names(names) == {name: name for name in names}
    assert open_index(tmp_path).stored_names([*names, "a buffer that is not stored"]) is None


def test_extra_tensors_are_reported(tmp_path: Path) -> None:
    _change(tmp_path, lambda stored: stored.update(extra=torch.zeros(2)))
    assert open_index(tmp_path).check() == ("extra",)


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    _change(tmp_path, lambda stored: stored.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(CheckpointError, match=r"1 of .*'model\.layers\.1\.mlp\.up_proj\.weight'.*model\.safetensors"):
        open_index(tmp_path).check()


def test_a_missing_untied_head_is_not_taken_from_the_embedding(tmp_path: Path) -> None:
    _change(tmp_path, lambda stored: stored.pop("lm_head.weight"))
    with pytest.raises(CheckpointError, match="lm_head"):
        open_index(tmp_path).check()


def test_a_wrong_shape_is_named_with_both(tmp_path: Path) -> None:
    _change(tmp_path, lambda stored: stored.update({"model.norm.weight": torch.zeros(47)}))
    with pytest.raises(
        CheckpointError, match=r"'model\.norm\.weight' has shape \[47\] in .*model\.safetensors.*\[48\]"
    ):
        open_index(tmp_path).check()


def test_a_missing_expert_is_found(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(EXPERTS["experts stored one by one"])
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    name = next(name for name in stored if ".experts.2." in name)
    del stored[name]
    save_file(stored, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"experts.*(shape|cannot be made)"):
        open_index(tmp_path).check()


def test_an_unknown_name_is_refused(tmp_path: Path) -> None:
    TINY["llama"]().save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"no weight 'nonsense' in .*model\.safetensors"):
        open_index(tmp_path).read("nonsense")


class Plain(nn.Module):
    """A user's own module: tied weights, a stored buffer, a computed one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 4)
        self.head = nn.Linear(4, 5, bias=False)
        self.head.weight = self.embed.weight
        self.norm = nn.LayerNorm(4)
        self.register_buffer("scale", torch.tensor([2.0]))
        self.register_buffer("table", torch.arange(4.0), persistent=False)


def test_a_plain_module_reads_a_checkpoint_by_its_own_names(tmp_path: Path) -> None:
    module = Plain()
    stored = {"embed.weight": torch.randn(5, 4), "norm.weight": torch.ones(4), "norm.bias": torch.zeros(4)}
    save_file(stored, tmp_path / "model.safetensors")
    index = CheckpointIndex(StoredTensors(find_weight_files(tmp_path)), module)
    assert index.check() == ()
    assert torch.equal(index.read("head.weight"), stored["embed.weight"])
    assert index.read("scale") is module.scale  # a buffer that is not stored is the module's own


def test_a_live_module_reads_itself() -> None:
    module = Plain()
    reader = ModuleReader(module)
    for name, want in {**module.state_dict(keep_vars=True), "table": module.table}.items():
        assert reader.read(name) is want
    with pytest.raises(CheckpointError, match="'nonsense'"):
        reader.read("nonsense")
    with pytest.raises(CheckpointError, match=r"'head\.weight' is on the meta device"):
        ModuleReader(Plain().to("meta")).read("head.weight")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_made_up_weights_are_the_same_every_time_and_keep_outputs_finite(dtype: torch.dtype) -> None:
    model = instantiate(TINY["gemma3_text"]().config, dtype=dtype)
    state = {name: DummyReader(model).read(name) for name in model.state_dict()}
    for name, tensor in model.state_dict().items():
        assert (state[name].shape, state[name].dtype) == (tensor.shape, dtype)
        assert torch.equal(state[name], DummyReader(model).read(name))
    assert torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"])
    assert not torch.equal(state["model.layers.0.mlp.up_proj.weight"], state["model.layers.1.mlp.up_proj.weight"])
    assert 0.01 < state["model.layers.0.mlp.up_proj.weight"].float().std() < 0.03
    assert 0.9 < state["model.norm.weight"].float().mean() < 1.1
    model.load_state_dict(state, assign=True)
    logits = model(torch.arange(8)[None]).logits
    assert logits.isfinite().all() and logits.float().std() > 0


def test_made_up_matrices_larger_than_a_block_have_no_equal_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DummyReader, "_BLOCK", 101)
    linear = nn.Linear(25, 40, bias=True, device="meta")
    weight: Tensor = DummyReader(linear).read("weight")
    assert weight.unique(dim=0).shape == weight.shape
    assert DummyReader(linear).read("bias").abs().max() < 0.2  # a vector, but not called weight
    with pytest.raises(CheckpointError, match="'nonsense'"):
        DummyReader(linear).read("nonsense")


def _change(folder: Path, change: object) -> None:
    """A checkpoint of the untied tiny model whose tensors went through `change`."""
    TINY["llama"]().save_pretrained(folder)
    stored = load_file(folder / "model.safetensors")
    change(stored)  # type: ignore[operator]
    save_file(stored, folder / "model.safetensors")
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is False
