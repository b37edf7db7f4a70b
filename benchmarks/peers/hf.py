"""transformers as a peer: eager `generate`; several requests at once are one batch, padded on the left."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.generation.streamers import BaseStreamer
from worker import serve


class _Rows(BaseStreamer):
    """Emits each step's tokens, of every row that wants more."""

    def __init__(self, lengths: list[int], emit: Callable[[int, list[int]], None]) -> None:
        self.lengths, self.emit, self.step = lengths, emit, -1

    def put(self, value: torch.Tensor) -> None:
        if self.step >= 0:  # the first entry is the prompts
            for index, token in enumerate(value.tolist()):
                if self.step < self.lengths[index]:
                    self.emit(index, [token])
        self.step += 1

    def end(self) -> None:
        pass


class Transformers:
    """A model in bfloat16, or in float32 as a reference, with its default cache."""

    def __init__(self, job: dict[str, Any]) -> None:
        torch.set_num_threads(job["threads"])
        dtype = torch.float32 if job["precision"] == "float32" else torch.bfloat16
        loaded: Any = AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype)
        self.model = loaded.eval()

    def generate(self, prompts: list[list[int]], lengths: list[int], emit: Callable[[int, list[int]], None]) -> None:
        width = max(map(len, prompts))
        self.model.generate(
            torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts]),
            attention_mask=torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]),
            do_sample=False,
            min_new_tokens=max(lengths),
            max_new_tokens=max(lengths),
            streamer=_Rows(lengths, emit),
        )

    def score(self, tokens: list[int]) -> list[tuple[float, int]]:
        with torch.inference_mode():
            logprobs = self.model(torch.tensor([tokens])).logits[0, :-1].double().log_softmax(-1)
        chosen = logprobs.gather(-1, torch.tensor(tokens[1:])[:, None])[:, 0]
        return list(zip(chosen.tolist(), logprobs.argmax(-1).tolist(), strict=True))


if __name__ == "__main__":
    serve(Transformers)
