"""A checkpoint folder in, one out that vLLM's CPU build runs at int8.

    python vllm_convert.py CHECKPOINT TARGET int8

The format is compressed-tensors, which vLLM reads without another package: a scale for each row, and activations are
quantised as they come. Embeddings and the head stay in bfloat16.
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

KEPT = ("embed_tokens", "lm_head", ".gate.", "_gate.", "conv1d", "norm")
"""Parts of the names of matrices that are not quantised: tables, the choice of experts, convolutions, norms."""

_INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
QUANTIZATION: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head", "re:.*[._]gate$"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": _INT8 | {"strategy": "channel", "dynamic": False},
            "input_activations": _INT8 | {"strategy": "token", "dynamic": True},
        }
    },
}


def quantised(tensors: dict[str, Any]) -> dict[str, Any]:
    """The same tensors, with matrices of `float` [N, K] as int8 [N, K] and a bfloat16 scale [N, 1] beside them."""
    import torch

    result: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if tensor.ndim != 2 or not name.endswith(".weight") or any(part in name for part in KEPT):
            result[name] = tensor
            continue
        scale = (tensor.float().abs().amax(1, keepdim=True).clamp(min=1e-8) / 127).bfloat16()
        result[name] = (tensor.float() / scale.float()).round().clamp(-127, 127).to(torch.int8)
        result[f"{name}_scale"] = scale
    return result


def main() -> None:
    """Write the folder."""
    from safetensors.torch import load_file, save_file

    source, target = map(Path, sys.argv[1:3])
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, target)
    for file in source.glob("*.safetensors"):
        save_file(quantised(load_file(file)), target / file.name, metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = QUANTIZATION
    (target / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
