"""`transformers.generate` to compare with: the same model folder and prompt in; tokens and their times out."""

import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, CompileConfig, PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from autodeploy.config import ModelOptions
from autodeploy.models.resolve import resolve_model


@dataclass(frozen=True, kw_only=True)
class Timing:
    """One greedy generation: its token ids, seconds to the first token, seconds from there to the last."""

    token_ids: list[int]
    first_token_seconds: float
    decode_seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Rate of the tokens after the first; there must be one."""
        return (len(self.token_ids) - 1) / self.decode_seconds


class _Clock(BaseStreamer):
    """When `generate` handed over the prompt and each token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def load(model: str, options: ModelOptions, device: torch.device) -> PreTrainedModel:
    """The same weights as AutoDeploy would serve, in the same dtype."""
    resolved = resolve_model(model, options)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        resolved.folder, dtype=resolved.dtype, trust_remote_code=options.trust_remote_code
    )
    reference: PreTrainedModel = loaded.eval().to(device)
    return reference


def compiled_static_cache(device: str = "cpu") -> dict[str, Any]:
    """Arguments of `generate` for its static cache and compiled forward, which it leaves out on CPUs unless told.

    Args:
        device: type of the model's; on CUDA the forward is compiled as `generate` does by itself, with CUDA graphs.
    """
    config = CompileConfig() if device == "cuda" else CompileConfig(mode="default")
    config._compile_all_devices = True  # type: ignore[assignment]
    return {"cache_implementation": "static", "compile_config": config}


def generate(model: Any, prompt: list[int], num_tokens: int, **arguments: Any) -> Timing:
    """Generate greedily, exactly `num_tokens`; `arguments` go to `generate` as they are."""
    clock = _Clock()
    ids = torch.tensor([prompt], device=model.device)
    start = time.perf_counter()
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=False,
        min_new_tokens=num_tokens,
        max_new_tokens=num_tokens,
        streamer=clock,
        **arguments,
    )
    first = clock.times[1]  # the first entry is the prompt
    return Timing(
        token_ids=output[0, len(prompt) :].tolist(),
        first_token_seconds=first - start,
        decode_seconds=clock.times[-1] - first,
    )
