"""What vLLM reads at int8 is the checkpoint within half a step of each row's scale; what it keeps is untouched."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests import tiny

Script = Callable[[str], Any]


def test_rows_have_scales_and_the_rest_is_kept(script: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    tiny.qwen2_moe().to(torch.bfloat16).save_pretrained(source)
    monkeypatch.setattr(sys, "argv", ["vllm_convert.py", str(source), str(target), "int8"])
    script("peers.vllm_convert").main()
    before, after = (load_file(folder / "model.safetensors") for folder in (source, target))
    rounded = {name for name in before if f"{name}_scale" in after}
    assert set(after) == set(before) | {f"{name}_scale" for name in rounded}
    assert {name.rsplit(".", 2)[1] for name in rounded} == {
        *(f"{part}_proj" for part in ("q", "k", "v", "o")),
        *(f"{part}_proj" for part in ("gate", "up", "down")),
    }
    for name, tensor in before.items():
        if name not in rounded:
            assert torch.equal(after[name], tensor)
            continue
        scale = after[f"{name}_scale"].float()
        assert after[name].dtype == torch.int8 and scale.shape == (len(tensor), 1)
        error = (after[name].float() * scale - tensor.float()).abs()
        assert (error <= scale * 0.75).all()  # half a step, and what rounding the scale adds to a row's largest value
    config = json.loads((target / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "compressed-tensors"
    assert config["model_type"] == "qwen2_moe"
