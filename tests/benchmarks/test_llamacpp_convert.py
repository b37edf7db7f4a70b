"""A checkpoint written as GGUF is the same model when transformers reads the GGUF file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests import tiny

Script = Callable[[str], Any]


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_transformers_reads_back_the_same_weights(name: str, script: Script, tmp_path: Path) -> None:
    model = tiny.TINY[name]().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "model")
    script("peers.llamacpp_convert").write_bf16(tmp_path / "model", tmp_path / "model.gguf")
    # With the model's own config: this reader knows no head size apart from the hidden size.
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", config=model.config, dtype=torch.bfloat16
    )
    expected, found = model.state_dict(), loaded.state_dict()
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=0, atol=0)


def test_an_architecture_without_gguf_names_is_refused(script: Script, tmp_path: Path) -> None:
    tiny.TINY["gpt2"]().save_pretrained(tmp_path)
    with pytest.raises(SystemExit, match="no GGUF names are known for gpt2"):
        script("peers.llamacpp_convert").write_bf16(tmp_path, tmp_path / "model.gguf")
