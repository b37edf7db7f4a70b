"""A checkpoint folder in, a GGUF file out: bfloat16 by the gguf package, from there int8 and int4 by llama.cpp itself.

python llamacpp_convert.py CHECKPOINT TARGET bf16              # in AutoDeploy's environment, which has gguf
python llamacpp_convert.py BF16_FILE TARGET int8|int4          # in llama.cpp's, which has its quantiser
"""

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

ARCHITECTURES = {"llama": "llama", "qwen3": "qwen3", "qwen3_moe": "qwen3moe", "granitemoehybrid": "granitehybrid"}


def write_bf16(checkpoint: Path, target: Path) -> None:
    """Write every tensor under its GGUF name: matrices in bfloat16, the rest in float32; and the vocabulary."""
    import gguf
    import torch
    from safetensors.torch import load_file

    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    architecture = ARCHITECTURES.get(config["model_type"])
    if architecture is None:
        sys.exit(f"no GGUF names are known for {config['model_type']}; known: {', '.join(ARCHITECTURES)}")
    kind = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    names = gguf.get_tensor_name_map(kind, config["num_hidden_layers"])
    writer = gguf.GGUFWriter(target, architecture)
    _write_fields(writer, config)
    _write_vocabulary(writer, checkpoint / "tokenizer.json", config)
    tensors = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        tensors |= load_file(file)
    for name, tensor in _as_llamacpp_has_them(tensors, config).items():
        stem, suffix = name.rsplit(".", 1) if name.endswith((".weight", ".bias")) else (name, "")
        found = names.get_name(stem)
        if found is None:
            sys.exit(f"GGUF has no name for {name}")
        full = f"{found}.{suffix}" if suffix else found
        if tensor.ndim > 1 and tensor.dtype == torch.bfloat16:
            raw = tensor.contiguous().view(torch.uint8).numpy()
            writer.add_tensor(full, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(full, tensor.float().numpy())
    for step in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file, writer.close):
        step()


def _write_fields(writer: Any, config: dict[str, Any]) -> None:
    heads, size = config["num_attention_heads"], config["hidden_size"]
    head_size = config.get("head_dim") or size // heads
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(size)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_key_length(head_size)
    writer.add_value_length(head_size)
    writer.add_rope_dimension_count(head_size)
    writer.add_rope_freq_base((config.get("rope_parameters") or {}).get("rope_theta", 10000.0))
    kv_heads = config["num_key_value_heads"]
    if config["model_type"] != "granitemoehybrid":
        writer.add_head_count_kv(kv_heads)
        writer.add_feed_forward_length(config["intermediate_size"])
    else:
        attends = [kind in ("attention", "full_attention") for kind in config["layer_types"]]
        writer.add_head_count_kv([kv_heads if attending else 0 for attending in attends])
        writer.add_feed_forward_length(config["shared_intermediate_size"])
        writer.add_ssm_conv_kernel(config["mamba_d_conv"])
        writer.add_ssm_state_size(config["mamba_d_state"])
        writer.add_ssm_group_count(config["mamba_n_groups"])
        writer.add_ssm_inner_size(config["mamba_n_heads"] * config["mamba_d_head"])
        writer.add_ssm_time_step_rank(config["mamba_n_heads"])
        writer.add_attention_scale(config["attention_multiplier"])
        writer.add_embedding_scale(config["embedding_multiplier"])
        writer.add_residual_scale(config["residual_multiplier"])
        writer.add_logit_scale(config["logits_scaling"])
        writer.add_rope_scaling_finetuned(config.get("position_embedding_type") == "rope")  # how it says "no positions"
    if config["model_type"] == "qwen3_moe":
        writer.add_expert_count(config.get("num_experts") or config["num_local_experts"])
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])


def _write_vocabulary(writer: Any, path: Path, config: dict[str, Any]) -> None:
    """Byte-level BPE, for texts of tokens; prompts come as token ids, so how texts are split does not matter."""
    from gguf import TokenType

    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"model": {"type": "none"}}
    if stored["model"]["type"] != "BPE":
        writer.add_tokenizer_model("none")
        return
    special = {token["id"] for token in stored["added_tokens"] if token["special"]}
    vocabulary = stored["model"]["vocab"] | {token["content"]: token["id"] for token in stored["added_tokens"]}
    names = {number: text for text, number in vocabulary.items()}
    numbers = range(config["vocab_size"])
    kinds = {number: TokenType.CONTROL if number in special else TokenType.NORMAL for number in names}
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in stored["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([names.get(number, f"[unused {number}]") for number in numbers])
    writer.add_token_types([kinds.get(number, TokenType.UNUSED) for number in numbers])
    writer.add_token_merges(merges)
    if isinstance(config.get("eos_token_id"), int):
        writer.add_eos_token_id(config["eos_token_id"])


def _as_llamacpp_has_them(tensors: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """The same tensors, renamed and laid out as its loader expects them."""
    import torch

    result: dict[str, Any] = {}
    experts: dict[str, dict[int, Any]] = {}
    for name, tensor in tensors.items():
        before, _, after = name.partition(".mlp.experts.")
        if after:  # one matrix per expert becomes one stack
            number, _, rest = after.partition(".")
            experts.setdefault(f"{before}.mlp.experts.{rest}", {})[int(number)] = tensor
        elif name.endswith("shared_mlp.input_linear.weight"):
            stem = name.replace("shared_mlp.input_linear.weight", "mlp.")
            result[f"{stem}gate_proj.weight"], result[f"{stem}up_proj.weight"] = tensor.chunk(2)
        elif name.endswith("A_log"):
            result[name] = -torch.exp(tensor.float())[:, None]
        elif name.endswith("mamba.D"):
            result[name] = tensor.float()[:, None]
        elif name.endswith("conv1d.weight"):
            result[name] = tensor.float().squeeze(1)
        elif name.endswith("mamba.norm.weight"):
            result[name] = tensor.float().reshape(config["mamba_n_groups"], -1)
        else:
            new = name.replace("mamba.dt_bias", "mamba.dt_proj.bias").replace(
                "shared_mlp.output_linear", "mlp.down_proj"
            )
            result[new] = tensor
    for name, numbered in experts.items():
        result[name] = torch.stack([numbered[number] for number in sorted(numbered)])
    if config["model_type"] in ("llama", "granitemoehybrid"):
        _interleave_heads(result, config)
    return result


def _interleave_heads(tensors: dict[str, Any], config: dict[str, Any]) -> None:
    """Rotary pairs lie half a head apart in a checkpoint, side by side in GGUF."""
    for name, heads in (("q_proj", config["num_attention_heads"]), ("k_proj", config["num_key_value_heads"])):
        for key in [key for key in tensors if key.endswith(f"{name}.weight")]:
            weight = tensors[key]
            halves = weight.reshape(heads, 2, -1, weight.shape[1])
            tensors[key] = halves.transpose(1, 2).reshape(weight.shape)


def quantise(source: Path, target: Path, precision: str) -> None:
    """Q8_0 or Q4_0, by llama.cpp's quantiser with its defaults."""
    import llama_cpp as ll

    params = ll.llama_model_quantize_default_params()
    params.ftype = {"int8": ll.LLAMA_FTYPE_MOSTLY_Q8_0, "int4": ll.LLAMA_FTYPE_MOSTLY_Q4_0}[precision]
    if ll.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params)):
        sys.exit(f"llama.cpp cannot quantise {source} to {precision}")


def main() -> None:
    """Write the file."""
    source, target, precision = sys.argv[1:]
    if precision == "bf16":
        write_bf16(Path(source), Path(target))
    else:
        quantise(Path(source), Path(target), precision)


if __name__ == "__main__":
    main()
