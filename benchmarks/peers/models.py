"""The models that peers are compared on: a name goes in, a checkpoint folder comes out, written once.

`smollm2` has real weights, from a Python package. The others have random weights in the shape of a published model, or
in a small shape of a kind of model; speed does not depend on what the weights are. `smollm2-rescaled` is the same
function as `smollm2`, whose weights lie on the grid of a format of 4 bits: what quantising costs shows on the former.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import yaml

SEED_MODELS = Path(__file__).parents[1] / "seed_models.yaml"
_DEFAULT_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}

# Attention in 4 of 32 layers, Mamba-2 in the others; no experts.
_HYBRID: dict[str, Any] = {
    "type": "granitemoehybrid",
    "hidden_size": 768,
    "num_hidden_layers": 32,
    "layer_types": ["attention" if layer % 8 == 5 else "mamba" for layer in range(32)],
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "shared_intermediate_size": 2048,
    "num_local_experts": 0,
    "num_experts_per_tok": 0,
    "mamba_n_heads": 48,
    "mamba_d_head": 32,
    "mamba_d_state": 128,
    "mamba_n_groups": 1,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}
# 370 million parameters, of which a token uses 145.
_EXPERTS: dict[str, Any] = {
    "type": "qwen3_moe",
    "hidden_size": 1024,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "moe_intermediate_size": 512,
    "num_experts": 16,
    "num_experts_per_tok": 4,
    "norm_topk_prob": True,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
}
_TINY: dict[str, Any] = {
    "type": "llama",
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 512,
}
_TINY_TEXT: dict[str, Any] = _TINY | {"vocab_size": 49152, "max_position_embeddings": 8192}
RANDOM: dict[str, Any] = {
    "hybrid": _HYBRID,
    "moe": _EXPERTS,
    "tiny": _TINY,
    "tiny-text": _TINY_TEXT,
    "qwen3-0.6b": {},
    "llama-3.2-1b": {},
}
NAMES = ("smollm2", "smollm2-rescaled", *RANDOM)
FOR_CHECKS = ("tiny", "tiny-text", "smollm2-rescaled")
"""Not to be measured for speed: too small, or the same as another."""


def folder(build: Path, name: str) -> Path:
    """The checkpoint folder of one of `NAMES`, or the path itself where it is none of them."""
    if name not in NAMES:
        return Path(name)
    if name == "smollm2":
        return _packaged()
    target = build / "models" / name / "checkpoint"
    if not (target / "config.json").exists():
        if name == "smollm2-rescaled":
            _write_rescaled(_packaged(), target)
        else:
            _write(target, _config(name))
        if name == "tiny":
            _write_byte_tokenizer(target)
        else:  # some peers load nothing without a tokenizer, and use it for nothing here
            for file in _packaged().glob("tokenizer*"):
                shutil.copy(file, target)
    return target


def _packaged() -> Path:
    from autodeploy.config import ModelOptions
    from autodeploy.models.locate import locate_model
    from autodeploy.packaged_models import model_path

    return locate_model(model_path("smollm2"), ModelOptions()).folder


def _write_rescaled(source: Path, target: Path) -> None:
    """The same function with other numbers: what multiplies a channel is divided out where the channel is read."""
    import torch
    from safetensors.torch import load_file, save_file

    weights = {name: tensor.float() for name, tensor in load_file(source / "model.safetensors").items()}
    draw = torch.Generator().manual_seed(0)

    def rescale(rows: str, readers: list[str], heads: int = 1, repeats: int = 1) -> None:
        scales = torch.rand(weights[rows].shape[0], generator=draw) * 0.5 + 0.75
        weights[rows] *= scales.view(-1, *[1] * (weights[rows].dim() - 1))
        for reader in readers:
            weights[reader] /= scales.view(heads, -1).repeat_interleave(repeats, 0).flatten()

    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}."
        attention, mlp = f"{name}self_attn.", f"{name}mlp."
        rescale(f"{name}input_layernorm.weight", [f"{attention}{part}_proj.weight" for part in "qkv"])
        rescale(f"{name}post_attention_layernorm.weight", [f"{mlp}{part}_proj.weight" for part in ("gate", "up")])
        rescale(f"{mlp}up_proj.weight", [f"{mlp}down_proj.weight"])
        heads = config["num_key_value_heads"]
        repeats = config["num_attention_heads"] // heads
        rescale(f"{attention}v_proj.weight", [f"{attention}o_proj.weight"], heads, repeats)
    target.mkdir(parents=True)
    save_file({name: tensor.bfloat16() for name, tensor in weights.items()}, target / "model.safetensors")
    for file in source.glob("*.json"):
        shutil.copy(file, target)


def _write_byte_tokenizer(target: Path) -> None:
    """A token per byte; byte 0 is the end of a text."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    vocabulary = {character: byte for byte, character in bytes_to_unicode().items()}
    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    end = bytes_to_unicode()[0]
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end).save_pretrained(str(target))


def _config(name: str) -> dict[str, Any]:
    """A random model's config; those of published models are in seed_models.yaml, but for their scaled positions."""
    if RANDOM[name]:
        return dict(RANDOM[name])
    fields = dict(yaml.safe_load(SEED_MODELS.read_text(encoding="utf-8"))["configs"][name])
    return fields | _DEFAULT_ROPE


def _write(target: Path, fields: dict[str, Any]) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(fields.pop("type"), **fields, dtype="bfloat16")
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    partial = target.with_name("partial")
    model.save_pretrained(partial)
    if "layer_types" in fields:  # stored under new names, which peers with an older transformers do not read
        stored = json.loads((partial / "config.json").read_text(encoding="utf-8"))
        stored["layer_types"] = fields["layer_types"]
        (partial / "config.json").write_text(json.dumps(stored, indent=1), encoding="utf-8")
    partial.rename(target)
