"""vLLM's CPU backend as a peer: its engine in this process, stepped by hand; a checkpoint folder is the model."""

from collections.abc import Callable
from typing import Any

from worker import serve


class VLLM:
    """One engine in bfloat16, with its compiler on, as is its default."""

    def __init__(self, job: dict[str, Any]) -> None:
        from vllm import LLM, SamplingParams, TokensPrompt

        self.params, self.prompt = SamplingParams, TokensPrompt
        llm = LLM(job["model"], skip_tokenizer_init=True, dtype="bfloat16", enable_prefix_caching=False)
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
