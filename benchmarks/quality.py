"""What a precision of weights costs in quality: perplexity and agreement with float32, ours beside llama.cpp's.

    python benchmarks/quality.py --output benchmarks/results

The text is Python's own documentation. The reference is transformers in float32; a peer agrees in a place where its
likeliest next token is the reference's. On a checkpoint without a tokenizer, tokens are random.
"""

import argparse
import json
import math
import platform
import random
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from peers import environments, models
from peers.subjects import KINDS, prepare, vocab_size
from suites.lm_eval import paragraphs

from autodeploy.bench import record

SUBJECTS = {
    "float32": ["transformers"],
    "bf16": ["AutoDeploy", "transformers", "llama.cpp"],
    "int8": ["AutoDeploy", "llama.cpp"],
    "int4": ["AutoDeploy", "llama.cpp"],
}
Scores = list[list[tuple[float, int]]]


def windows(checkpoint: Path, number: int, length: int) -> list[list[int]]:
    """Token ids of pieces of a text, equally long."""
    draw = random.Random(0)
    if not (checkpoint / "tokenizer.json").exists():
        ids = range(vocab_size(checkpoint))
        return [draw.choices(ids, k=length) for _ in range(number)]
    from tokenizers import Tokenizer

    texts = paragraphs()
    draw.shuffle(texts)
    ids = Tokenizer.from_file(str(checkpoint / "tokenizer.json")).encode("\n\n".join(texts)).ids
    if len(ids) < number * length:
        sys.exit(f"the text has {len(ids)} tokens, {number * length} are wanted; take fewer or shorter windows")
    return [ids[start : start + length] for start in range(0, number * length, length)]


def figures(scores: Scores, reference: Scores) -> dict[str, float]:
    """Perplexity; places where the likeliest token is the reference's; distance of the text's log-probabilities."""
    own, other = ([pair for text in each for pair in text] for each in (scores, reference))
    pairs = list(zip(own, other, strict=True))
    return {
        "perplexity": math.exp(-sum(logprob for logprob, _ in own) / len(own)),
        "agreement": sum(mine[1] == its[1] for mine, its in pairs) / len(pairs),
        "logprob_distance": sum(abs(mine[0] - its[0]) for mine, its in pairs) / len(pairs),
    }


def run(given: argparse.Namespace, build: Path) -> dict[str, Any]:
    """Precision -> subject -> figures."""
    checkpoint = models.folder(build, given.model)
    texts = windows(checkpoint, given.windows, given.length)
    found: dict[str, Any] = {}
    reference: Scores | None = None
    for precision, names in SUBJECTS.items():
        for name in names:
            if given.smoke and KINDS[name].environment:
                continue
            try:
                subject = prepare(name, precision, given.model, checkpoint, build)
            except environments.NotAvailable as reason:
                print(f"not available: {name} {precision}: {reason}", flush=True)
                continue
            with subject.launch() as peer:
                peer.ask("settle")
                scores = [[tuple(pair) for pair in peer.ask("score", tokens=text)["score"]] for text in texts]
            reference = reference or scores
            found.setdefault(precision, {})[name] = figures(scores, reference)
            print(f"{precision} {name}: {found[precision][name]}", flush=True)
    return found


def main(arguments: list[str] | None = None) -> None:
    """Compare, print, and write a record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "model", nargs="?", default="smollm2-rescaled", help=f"of {', '.join(models.NAMES)}, or a folder"
    )
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--smoke", action="store_true", help="a tiny model, no peers that need an environment, seconds")
    parser.add_argument("--build", type=Path, default=Path(__file__).parents[1] / "build" / "peers")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/local"))
    given = parser.parse_args(arguments)
    if given.smoke:
        given.model, given.windows, given.length = "tiny", 2, 32
    with tempfile.TemporaryDirectory() as scratch:
        found = run(given, Path(scratch) if given.smoke else given.build.resolve())
    raw = {"benchmark": "quality", "command": sys.argv, "model": given.model, "precisions": found}
    raw |= {"machine": record.machine(), "versions": record.versions()}
    given.output.mkdir(parents=True, exist_ok=True)
    path = given.output / f"quality-{Path(given.model).name}_{platform.machine()}_{time.strftime('%Y%m%d-%H%M')}.json"
    path.write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
