"""Deploy an `nn.Module` that is no transformers class, token ids in and out: `python examples/own_module.py`."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from autodeploy import LLM, SamplingParams


class Layer(nn.Module):
    """Causal attention, then a small MLP."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query_key_value = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, hidden: Tensor) -> Tensor:
        """`[1, T, width]` to the same; attention as anyone would write it."""
        batch, length, width = hidden.shape
        heads = self.query_key_value(self.norm(hidden)).view(batch, length, 3, self.num_heads, -1)
        query, key, value = (part.transpose(1, 2) for part in heads.unbind(2))
        mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        hidden = hidden + self.output(mixed.transpose(1, 2).reshape(batch, length, width))
        return hidden + self.mlp(self.mlp_norm(hidden))


class Model(nn.Module):
    """Token ids `[1, T]` to logits `[1, T, V]`."""

    def __init__(self, vocab_size: int = 256, width: int = 64, num_layers: int = 2) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.layers = nn.ModuleList(Layer(width, num_heads=4) for _ in range(num_layers))
        self.head = nn.Linear(width, vocab_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Logits of the next token at every position."""
        hidden = self.embedding(input_ids)
        for layer in self.layers:
            hidden = layer(hidden)
        logits: Tensor = self.head(hidden)
        return logits


def main() -> None:
    """Generate with continuous batching and a paged cache, and check the first tokens against the plain module."""
    torch.manual_seed(0)
    model = Model().eval()
    prompts = [[1, 2, 3], [5, 8, 13, 21, 34, 55]]
    with LLM(model, skip_tokenizer_init=True, max_model_len=128) as llm:
        outputs = llm.generate(prompts, SamplingParams(max_tokens=8, temperature=0.0))
    for prompt, output in zip(prompts, outputs, strict=True):
        expected = model(torch.tensor([prompt]))[0, -1].argmax().item()
        token_ids = list(output.outputs[0].token_ids)
        print(f"{prompt} -> {token_ids}; the module itself begins with {expected}")
        if token_ids[0] != expected:
            raise SystemExit("the deployed module disagrees with the module itself")


if __name__ == "__main__":
    main()
