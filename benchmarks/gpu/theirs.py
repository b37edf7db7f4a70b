"""Transformers on the same config and device: greedy, static cache, compiled forward, one request at a time."""

import statistics
from typing import Any

import torch

from autodeploy.bench import reference
from autodeploy.bench.latency import random_prompt
from gpu import models
from gpu.ours import SMOKE, Load


def single(name: str, *, smoke: bool) -> dict[str, Any]:
    """Tokens per second of the same requests as ours; on a CPU the forward is not compiled."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, load = models.reference(name, device, smoke=smoke), SMOKE if smoke else Load()
    (input_len, output_len), timings = load.single, []
    arguments = reference.compiled_static_cache("cuda") if device.type == "cuda" else {}
    for seed in range(load.repeats + 1):
        prompt = random_prompt(model.config.get_text_config().vocab_size, input_len, seed)
        timings.append(reference.generate(model, prompt, output_len, **arguments))
    return {
        "how": "static cache, compiled" if arguments else "eager",
        "first_request_seconds": timings[0].first_token_seconds + timings[0].decode_seconds,
        "time_to_first_token": statistics.median(timing.first_token_seconds for timing in timings[1:]),
        "tokens_per_second": statistics.median(timing.tokens_per_second for timing in timings[1:]),
    }
