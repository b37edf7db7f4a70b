"""A checkpoint folder that brings its own code: a research model as a file `modeling_paper.py`, found by `auto_map`."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from tests import research_models, tiny

_WRAPPER = """

from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class PaperConfig(PretrainedConfig):
    model_type = "paper"

    def __init__(self, hidden_size: int = 32, pattern: str = "amf", max_position_embeddings: int = 256, **others):
        self.hidden_size, self.pattern = hidden_size, pattern
        self.max_position_embeddings, self.vocab_size = max_position_embeddings, VOCAB
        super().__init__(**others)


class PaperForCausalLM(PreTrainedModel):
    config_class = PaperConfig

    def __init__(self, config):
        super().__init__(config)
        self.decoder = nemotron_flash(config.hidden_size, pattern=config.pattern)
        self.post_init()

    def forward(self, input_ids, **unused):
        return CausalLMOutput(logits=self.decoder(input_ids))
"""
_CONFIG = """{
 "model_type": "paper", "architectures": ["PaperForCausalLM"], "dtype": "float32", "hidden_size": 32, "pattern": "amf",
 "auto_map": {"AutoConfig": "modeling_paper.PaperConfig", "AutoModelForCausalLM": "modeling_paper.PaperForCausalLM"}
}"""


def save(folder: Path) -> Path:
    """Write code, config, weights and tokenizer; returns the folder."""
    folder.mkdir()
    text = (
        Path(research_models.__file__).read_text(encoding="utf-8").replace("VOCAB = 96", f"VOCAB = {tiny.VOCAB_SIZE}")
    )
    (folder / "modeling_paper.py").write_text(text + _WRAPPER, encoding="utf-8")
    (folder / "config.json").write_text(_CONFIG, encoding="utf-8")
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    model: nn.Module = AutoModelForCausalLM.from_config(config, trust_remote_code=True)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(parameter + 0.1 * noise if parameter.dim() == 1 else 0.3 * noise)
    save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
    tiny.tokenizer().save_pretrained(folder)
    return folder
