"""Models whose next token can be learned, and draft heads fitted to them in seconds."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoModel, LlamaConfig, PreTrainedModel

from autodeploy.models.draft_head import DraftHead
from tests.tiny import BOS, MAX_LENGTH


@torch.no_grad()
def make_predictable(model: PreTrainedModel) -> PreTrainedModel:
    """Let a tiny model say the bytes in one fixed random order for ever, except where its layers want something else.

    No token comes twice within 256, so that looking up what followed earlier is of no use. The embedding and the last
    layer must not be tied.
    """
    embedding, output = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    order = torch.randperm(BOS, generator=torch.Generator().manual_seed(3))
    following = torch.arange(len(embedding))
    following[order] = order.roll(-1)
    embedding.mul_(300)
    output.mul_(0.1)
    output[following] += embedding * (4 / embedding.norm(dim=1, keepdim=True))
    return model


def small_head(hidden_size: int, seed: int = 0) -> DraftHead:
    """An untrained head with one attention layer."""
    config = LlamaConfig(
        vocab_size=1,
        hidden_size=hidden_size,
        intermediate_size=2 * hidden_size,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=MAX_LENGTH,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        body = AutoModel.from_config(config)
        body.layers[0].input_layernorm = nn.Identity()
        head = DraftHead(body, hidden_size, has_norms=False, has_bias=True)
        head.fc = nn.Linear(2 * hidden_size, hidden_size)
    return head.eval().requires_grad_(False)


def fit(head: DraftHead, model: PreTrainedModel, token_ids: Tensor, steps: int) -> DraftHead:
    """Train a head on token ids `[N, T]` that the model generated: hidden states and the tokens they mean."""
    with torch.no_grad():
        hidden = model.base_model(token_ids).last_hidden_state
        embedded = model.get_input_embeddings()(token_ids)
        meant = model.get_output_embeddings()(hidden).argmax(-1)
    position_ids = torch.arange(token_ids.shape[1] - 1)[None].expand(len(token_ids), -1)
    optimizer = torch.optim.AdamW(head.requires_grad_(True).parameters(), lr=3e-3)
    for _ in range(steps):
        guessed = head(embedded[:, 1:], hidden[:, :-1], position_ids)
        logits = model.get_output_embeddings()(guessed)
        loss = F.smooth_l1_loss(guessed, hidden[:, 1:]) + F.cross_entropy(logits.flatten(0, 1), meant[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return head.requires_grad_(False)
