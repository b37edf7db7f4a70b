"""What drafts are worth: tokens per step and tokens per second, with each way of drafting beside none, in turns.

    python benchmarks/speculation.py MODEL [--draft-model MODEL] [--head FOLDER] [--rounds 3] [--tokens 64]

One sequence at a time, greedy, over two kinds of prompts: documents that repeat themselves, where lookup finds what
comes next, and ones that do not. Medians over rounds; `accepted` is the mean number of tokens that a verification
yields. `examples/fit_draft_head.py` makes a head.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from autodeploy import LLM, SamplingParams
from autodeploy.bench import record
from autodeploy.packaged_models import model_path

LENGTH = 48
"""tokens of a prompt that does not repeat itself"""


def prompts_of(llm: LLM, count: int) -> dict[str, list[list[int]]]:
    """Prompts as token ids, by kind, from Python's own documentation."""
    texts = list(topics.values())[-count:]
    plain = [llm.get_tokenizer()(text).input_ids[:LENGTH] for text in texts]
    return {"plain": plain, "repetitive": [3 * tokens + tokens[: LENGTH // 4] for tokens in plain]}


def measure(llm: LLM, prompts: list[list[int]], num_tokens: int) -> tuple[float, float]:
    """Seconds for all prompts one after the other, and the mean number of tokens a verification yielded meanwhile."""
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True)
    before, began = llm.stats(), time.perf_counter()
    for prompt in prompts:
        llm.generate(prompt, params, use_tqdm=False)
    seconds, after = time.perf_counter() - began, llm.stats()
    drafts = after.num_drafts - before.num_drafts
    return seconds, 1 + (after.accepted_tokens - before.accepted_tokens) / drafts if drafts else 1.0


def ways(args: argparse.Namespace) -> dict[str, dict[str, Any] | None]:
    """speculative_config by name."""
    count = {"num_speculative_tokens": args.drafts}
    chosen: dict[str, dict[str, Any] | None] = {"none": None, "ngram": {"method": "ngram", **count}}
    if args.draft_model:
        chosen["draft_model"] = {"method": "draft_model", "model": args.draft_model, **count}
    if args.head:
        chosen["head"] = {"method": "eagle", "model": args.head, **count}
    return chosen


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model")
    parser.add_argument("--draft-model")
    parser.add_argument("--head")
    for name, default in (("--rounds", 3), ("--prompts", 4), ("--tokens", 64), ("--drafts", 4)):
        parser.add_argument(name, type=int, default=default)
    parser.add_argument("--output", type=Path, help="write the figures there, as JSON")
    args = parser.parse_args(arguments)
    options = {"instant_on": False, "enable_prefix_caching": False}
    rounds: dict[tuple[str, str], list[tuple[float, float]]] = {}
    for _ in range(args.rounds):
        for name, config in ways(args).items():  # one at a time: teams of threads of two would be in each other's way
            llm = LLM(model_path(args.model), speculative_config=config, **options)
            for kind, prompts in prompts_of(llm, args.prompts).items():
                measure(llm, prompts, args.tokens)  # warms up
                rounds.setdefault((kind, name), []).append(measure(llm, prompts, args.tokens))
            llm.shutdown()
    rows = []
    for (kind, name), results in sorted(rounds.items(), key=lambda item: item[0][0]):
        seconds = statistics.median(seconds for seconds, _ in results)
        alone = statistics.median(seconds for seconds, _ in rounds[kind, "none"])
        speed = args.prompts * args.tokens / seconds
        rows.append({"prompts": kind, "drafts": name, "accepted": results[-1][1], "tokens_per_second": speed})
        rows[-1]["speedup"] = alone / seconds
    print("| prompts | drafts by | accepted | tokens/s | speed-up |\n|---|---|---|---|---|")
    for row in rows:
        accepted, speed, speedup = row["accepted"], row["tokens_per_second"], row["speedup"]
        print(f"| {row['prompts']} | {row['drafts']} | {accepted:.2f} | {speed:.1f} | {speedup:.2f} |")
    if args.output:
        found = {"benchmark": "speculation", "model": args.model, "rows": rows}
        found |= {"machine": record.machine(), "versions": record.versions()}
        args.output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
