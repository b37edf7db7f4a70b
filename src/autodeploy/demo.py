"""`python -m autodeploy.demo [MODEL]`: a real model in; a streamed answer, what the build did, and its speed out.

MODEL is one of the models that come as Python packages (`packaged_models.py`), a checkpoint folder, a GGUF file or a
hub id. The speed is compared with `transformers.generate` on the same machine, weights, dtype and number of tokens, in
alternating runs.
"""

import argparse
import asyncio
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from autodeploy.bench import reference
from autodeploy.bench.reference import Timing
from autodeploy.cli import print_report
from autodeploy.config import ModelOptions
from autodeploy.errors import AutoDeployError
from autodeploy.llm import LLM
from autodeploy.packaged_models import DEFAULT, PACKAGED_MODELS, model_path
from autodeploy.runtime.request import SamplingParams

QUESTION = "Explain in three sentences why the sky is blue."
COMPLETION = "The history of the printing press begins with"


def prompt_ids(llm: LLM) -> tuple[str, list[int]]:
    """The demo's prompt as text and as token ids: a chat turn where the model has a template, else a beginning."""
    if llm.get_tokenizer().chat_template:
        return QUESTION, llm.apply_chat_template([{"role": "user", "content": QUESTION}])
    return COMPLETION, plain_ids(llm, COMPLETION)


def plain_ids(llm: LLM, text: str) -> list[int]:
    """Token ids of a text, with the special tokens that the tokenizer adds by itself."""
    ids: Any = llm.get_tokenizer()(text)["input_ids"]
    return list(ids)


async def stream(llm: LLM, prompt: list[int], params: SamplingParams, echo: bool) -> Timing:
    """Generate once through the public streaming interface; with `echo`, print the text as it comes."""
    start = time.perf_counter()
    first = last = start
    token_ids: list[int] = []
    printed = ""
    async for output in llm.generate_async(prompt, params, streaming=True):
        last = time.perf_counter()
        completion = output.outputs[0]
        if not token_ids:
            first = last
        token_ids = list(completion.token_ids)
        if echo:
            print(completion.text[len(printed) :], end="", flush=True)
            printed = completion.text
    return Timing(token_ids=token_ids, first_token_seconds=first - start, decode_seconds=last - first)


def compare(
    llm: LLM, model: PreTrainedModel, prompt: list[int], num_tokens: int, runs: int
) -> tuple[list[Timing], list[Timing]]:
    """Alternating runs of both, after one unmeasured run of each."""
    params = SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True)
    ours, theirs = [], []
    for _ in range(runs + 1):
        ours.append(asyncio.run(stream(llm, prompt, params, echo=False)))
        theirs.append(reference.generate(model, prompt, num_tokens))
    return ours[1:], theirs[1:]


def comparison_table(ours: Sequence[Timing], theirs: Sequence[Timing]) -> Table:
    """Medians side by side and as a ratio; above 1 is faster than transformers."""
    count, runs = len(ours[0].token_ids), len(ours)
    table = Table("", "autodeploy", "transformers", "ratio", title=f"{count} tokens, greedy, median of {runs}")
    rates = [statistics.median(timing.tokens_per_second for timing in side) for side in (ours, theirs)]
    firsts = [statistics.median(timing.first_token_seconds for timing in side) for side in (ours, theirs)]
    table.add_row("tokens per second", f"{rates[0]:.1f}", f"{rates[1]:.1f}", f"{rates[0] / rates[1]:.2f}x")
    milliseconds = [f"{first * 1e3:.0f} ms" for first in firsts]
    table.add_row("time to first token", *milliseconds, f"{firsts[1] / firsts[0]:.2f}x")
    same = _common_prefix(ours[0].token_ids, theirs[0].token_ids)
    table.add_row("tokens equal from the start", str(same), f"of {count}", "")
    return table


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def run(model: str, prompt: str | None, num_tokens: int, runs: int) -> None:
    """The whole demo; prints to standard output.

    Raises:
        AutoDeployError: the model cannot be found or deployed.
    """
    console = Console()
    name = model_path(model)
    console.print(f"Deploying {model}", markup=False, style="bold")
    with LLM(name, progress=lambda stage: console.print(f"  {stage}", markup=False)) as llm:
        text, ids = prompt_ids(llm) if prompt is None else (prompt, plain_ids(llm, prompt))
        console.print(f"\nPrompt: {text}\nAnswer:", markup=False, style="bold")
        params = SamplingParams(temperature=0.0, max_tokens=num_tokens)
        asyncio.run(stream(llm, ids, params, echo=True))
        print()
        console.print("waiting for the graph, where it is still being built ...")
        llm.wait_until_built()
        print_report(llm.report, console)
        if runs:
            console.print("Comparing with transformers.generate ...")
            device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
            loaded = reference.load(name, ModelOptions(), device)
            ours, theirs = compare(llm, loaded, ids, num_tokens, runs)
            console.print(comparison_table(ours, theirs))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run from the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m autodeploy.demo", description=__doc__)
    packaged = ", ".join(PACKAGED_MODELS)
    parser.add_argument("model", nargs="?", default=DEFAULT, help=f"{packaged}, a folder, a .gguf file or a hub id")
    parser.add_argument("--prompt", help="a plain prompt instead of the demo's own")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--runs", type=int, default=3, help="alternating runs of the comparison; 0 leaves it out")
    given = parser.parse_args(arguments)
    if given.max_tokens < 2:
        parser.error("--max-tokens must be at least 2: a rate needs a distance between tokens")
    try:
        run(given.model, given.prompt, given.max_tokens, given.runs)
    except AutoDeployError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
