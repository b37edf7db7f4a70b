"""The truth: what transformers' own code makes of a sequence, run whole, without a cache."""

import inspect
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

TIE = 1e-4
"""two logits this close, as a share of the largest, may be taken in either order by another order of additions"""


def accepts(model: nn.Module, name: str) -> bool:
    return name in inspect.signature(model.forward).parameters


@torch.no_grad()
def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits `[T, V]` of one sequence `ids [1, T]`, run at once."""
    takes_any = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(model.forward).parameters.values())
    output = model(ids, use_cache=False) if takes_any or accepts(model, "use_cache") else model(ids)
    if isinstance(output, Tensor):
        return output[0].float()
    logits: Tensor = output.logits if hasattr(output, "logits") else output[0]
    return logits[0].float()


@dataclass(frozen=True)
class Greedy:
    """A greedy continuation and, per token, how far the second choice was behind, as a share of the largest logit."""

    tokens: list[int]
    margins: list[float]

    def agrees(self, tokens: list[int]) -> tuple[bool, bool]:
        """Whether the tokens are these, and whether a tie had to be allowed for that; after one, sequences differ."""
        if tokens == self.tokens:
            return True, False
        if len(tokens) != len(self.tokens):
            return False, False
        first = next(at for at, (a, b) in enumerate(zip(tokens, self.tokens, strict=True)) if a != b)
        is_tie = self.margins[first] < TIE
        return is_tie, is_tie


def greedy(model: nn.Module, prompt: list[int], num_tokens: int) -> Greedy:
    """The whole sequence is run again for every token: the slow truth, whatever the state of the model's own cache."""
    tokens, margins = list(prompt), []
    for _ in range(num_tokens):
        last = logits_of(model, torch.tensor([tokens]))[-1]
        top = last.topk(2)
        margins.append(float((top.values[0] - top.values[1]) / last.abs().max()))
        tokens.append(int(top.indices[0]))
    return Greedy(tokens[len(prompt) :], margins)


@torch.no_grad()
def generated(model: PreTrainedModel, prompt: list[int], num_tokens: int) -> list[int]:
    """What `model.generate` makes of a prompt, greedily."""
    output = model.generate(
        torch.tensor([prompt]), max_new_tokens=num_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    tokens: list[int] = output[0, len(prompt) :].tolist()
    return tokens
