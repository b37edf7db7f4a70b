"""OpenVINO GenAI as a peer: its continuous-batching pipeline, stepped by hand; the model is a folder by optimum.

A prompt is prefilled whole, as in the settings its own `LLMPipeline` takes; its cache of prefixes is off, which
distinct prompts would not use.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import openvino as ov
import openvino_genai as genai
from worker import serve


class GenAI:
    """One pipeline on the CPU, computing in bfloat16."""

    def __init__(self, job: dict[str, Any]) -> None:
        scheduler = genai.SchedulerConfig()
        scheduler.max_num_batched_tokens = 2**31
        scheduler.enable_prefix_caching = False
        properties = {"INFERENCE_PRECISION_HINT": "bf16", "INFERENCE_NUM_THREADS": job["threads"]}
        self.pipeline = genai.ContinuousBatchingPipeline(job["model"], scheduler, "CPU", properties)
        self.requests = 0

    def generate(self, prompts: list[list[int]], lengths: list[int], emit: Callable[[int, list[int]], None]) -> None:
        handles = {}
        for index, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
            config = genai.GenerationConfig()
            config.max_new_tokens, config.ignore_eos, config.do_sample = length, True, False
            ids = ov.Tensor(np.array([prompt], dtype=np.int64))
            handles[index] = self.pipeline.add_request(self.requests, ids, config)
            self.requests += 1
        while self.pipeline.has_non_finished_requests():
            self.pipeline.step()
            for index, handle in handles.items():
                while handle.can_read():
                    for output in handle.read().values():
                        emit(index, list(output.generated_ids))

    def facts(self) -> dict[str, str]:
        return {"openvino": ov.get_version(), "openvino_genai": genai.__version__}


if __name__ == "__main__":
    serve(GenAI)
