"""Stream the answers to several prompts at once: `python examples/stream.py MODEL`."""

import asyncio
import sys

from autodeploy import LLM, SamplingParams


async def answer(llm: LLM, prompt: str) -> str:
    """Follow one request as its text grows; the engine batches all requests in flight."""
    text = ""
    async for output in llm.generate_async(prompt, SamplingParams(max_tokens=24, seed=1), streaming=True):
        text = output.outputs[0].text
        print(f"{prompt!r}: {len(output.outputs[0].token_ids)} tokens")
    return text


async def answer_all(llm: LLM, prompts: list[str]) -> list[str]:
    """All prompts side by side."""
    return await asyncio.gather(*(answer(llm, prompt) for prompt in prompts))


def main(model: str) -> None:
    """Print the answers when all of them are there."""
    with LLM(model) as llm:
        for text in asyncio.run(answer_all(llm, ["Once upon a time", "In the year 3000,"])):
            print(repr(text))


if __name__ == "__main__":
    main(sys.argv[1])
