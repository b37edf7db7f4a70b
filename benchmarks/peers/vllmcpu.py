"""vLLM's CPU backend as a peer: its engine in this process, stepped by hand; a checkpoint folder is the model.

It takes all memory for keys and values when it starts, so it is given what the largest load needs, and no more.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from worker import serve

MAX_MODEL_LEN = 4096
CACHED_TOKENS = 32 * 640


def cache_bytes(config: dict[str, Any]) -> int:
    """Keys and values of all tokens of a load in bfloat16, as if every layer had them: other states need room too."""
    head_size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    return CACHED_TOKENS * config["num_hidden_layers"] * config["num_key_value_heads"] * head_size * 4


class VLLM:
    """One engine that computes in bfloat16, with its compiler on, as is its default."""

    def __init__(self, job: dict[str, Any]) -> None:
        from vllm import LLM, SamplingParams, TokensPrompt

        self.params, self.prompt = SamplingParams, TokensPrompt
        config = json.loads((Path(job["model"]) / "config.json").read_text(encoding="utf-8"))
        llm = LLM(
            job["model"],
            skip_tokenizer_init=True,
            dtype="bfloat16",
            enable_prefix_caching=False,
            max_model_len=MAX_MODEL_LEN,
            kv_cache_memory_bytes=cache_bytes(config),
        )
        self.engine, self.requests = llm.llm_engine, 0

    def generate(self, prompts: list[list[int]], lengths: list[int], emit: Callable[[int, list[int]], None]) -> None:
        index_of = {}
        for index, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
            params = self.params(max_tokens=length, temperature=0.0, ignore_eos=True, detokenize=False)
            name = str(self.requests)
            self.engine.add_request(name, self.prompt(prompt_token_ids=prompt), params)
            index_of[name], self.requests = index, self.requests + 1
        seen = dict.fromkeys(index_of, 0)
        while self.engine.has_unfinished_requests():
            for output in self.engine.step():
                token_ids = list(output.outputs[0].token_ids)
                emit(index_of[output.request_id], token_ids[seen[output.request_id] :])
                seen[output.request_id] = len(token_ids)


if __name__ == "__main__":
    serve(VLLM)
