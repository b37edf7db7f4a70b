"""AutoDeploy as a peer: the public `LLM`, with no settings but the precision."""

import asyncio
from collections.abc import Callable
from typing import Any

from worker import serve

from autodeploy import LLM, SamplingParams


class AutoDeploy:
    """One `LLM` without a tokenizer, as token ids go in and come out."""

    def __init__(self, job: dict[str, Any]) -> None:
        precision = job["precision"]
        options = {} if precision == "bf16" else {"quantization": precision}
        self.llm = LLM(job["model"], skip_tokenizer_init=True, **options)

    def generate(self, prompts: list[list[int]], lengths: list[int], emit: Callable[[int, list[int]], None]) -> None:
        async def one(index: int) -> None:
            params = SamplingParams(max_tokens=lengths[index], temperature=0.0, ignore_eos=True)
            seen = 0
            async for output in self.llm.generate_async(prompts[index], params, streaming=True):
                token_ids = list(output.outputs[0].token_ids)
                emit(index, token_ids[seen:])
                seen = len(token_ids)

        async def every() -> None:
            await asyncio.gather(*map(one, range(len(prompts))))

        asyncio.run(every())

    def score(self, tokens: list[int]) -> list[tuple[float, int]]:
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=1)
        (output,) = self.llm.generate([tokens], params)
        scores = []
        for token, entries in zip(tokens[1:], (output.prompt_logprobs or [])[1:], strict=True):
            best = next(other for other, entry in entries.items() if entry.rank == 1)
            scores.append((entries[token].logprob, best))
        return scores

    def settle(self) -> None:
        self.llm.wait_until_built()

    def facts(self) -> dict[str, Any]:
        program = self.llm.program
        return {
            "step_weight_bytes": program.step_weight_bytes,
            "flops_per_token": program.flops_per_token,
            "flops_per_logits_row": program.flops_per_logits_row,
            "state_bytes_per_token": sum(getattr(spec, "bytes_per_token", 0) for spec in program.states),
            "state_bytes_per_sequence": sum(getattr(spec, "bytes_per_slot", 0) for spec in program.states),
            "kernels": program.report.kernels,
        }


if __name__ == "__main__":
    serve(AutoDeploy)
