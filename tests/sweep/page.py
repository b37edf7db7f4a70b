"""Results in, what a reader wants out: a summary, docs/supported-models.md, and the list of what is supported."""

import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
import transformers

from tests.sweep.architectures import ENCODER, SEQ2SEQ, same_architecture
from tests.sweep.stages import Result

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "supported-models.md"
LIST = ROOT / "tests" / "models" / "supported.json"


def summary(results: Sequence[Result]) -> str:
    """Counts in one paragraph."""
    counts = Counter(result["status"] for result in results)
    aliases = same_architecture(results)
    decoders = [result for result in results if result["status"] in ("passed", "failed")]
    distinct = [result for result in decoders if result["name"] not in aliases]
    passed = sum(result["status"] == "passed" for result in distinct)
    return (
        f"{counts['passed']} of {len(decoders)} decoders pass every stage ({passed} of {len(distinct)} without entries"
        f" that repeat another's class); {counts['no decoder']} entries are no decoders,"
        f" {counts['does not run']} do not run in transformers itself"
    )


def against_the_list(results: Sequence[Result]) -> tuple[list[str], list[str]]:
    """Names that are on the list and do not pass, and names that pass and are not on it."""
    pinned = pinned_list()
    lost = [r["name"] for r in results if r["name"] in pinned and r["status"] != "passed"]
    gained = [r["name"] for r in results if r["name"] not in pinned and r["status"] == "passed"]
    return lost, gained


def parts(result: Result) -> dict[str, int]:
    """Nodes of each token mixer, and of experts, in the tiny model."""
    experts = {"moe": result["experts"]} if result.get("experts") else {}
    return dict(result["mixers"]) | experts


def pinned_list() -> dict[str, dict[str, int]]:
    """Supported architectures, with the parts that their tiny models have."""
    if not LIST.exists():
        return {}
    pinned: dict[str, dict[str, int]] = json.loads(LIST.read_text(encoding="utf-8"))
    return pinned


def write(results: Sequence[Result], stages: Sequence[str], keep: Sequence[str] = ()) -> None:
    """Write the page and the list; names in `keep` stay on the list though they were lost."""
    pinned = pinned_list()
    supported = {r["name"]: parts(r) for r in results if r["status"] == "passed"}
    supported |= {name: pinned[name] for name in keep}
    lines = [f"{json.dumps(name)}: {json.dumps(supported[name])}" for name in sorted(supported)]
    LIST.write_text("{\n " + ",\n ".join(lines) + "\n}\n", encoding="utf-8")
    PAGE.write_text(text(results, stages), encoding="utf-8")


def text(results: Sequence[Result], stages: Sequence[str]) -> str:
    """The page."""
    by_name = sorted(results, key=lambda result: result["name"])
    groups = {
        status: [result for result in by_name if result["status"] == status]
        for status in ("passed", "failed", "does not run", "no decoder")
    }
    aliases = same_architecture(results)
    parts = [
        _HEADER.format(
            transformers=transformers.__version__,
            torch=torch.__version__.split("+")[0],
            summary=summary(results),
            left_out="" if "compile" in stages else " In the run that wrote this page (d) was left out.",
        ),
        "## Supported\n",
        "| model type | class | token mixers and experts in the tiny model | largest error |",
        "|---|---|---|---|",
        *(_supported_row(result, aliases) for result in groups["passed"]),
        "\n## Not supported\n",
        "| model type | class | stage | reason |",
        "|---|---|---|---|",
        *(_failed_row(result, aliases) for result in groups["failed"]),
        "\n## Not run in transformers itself\n",
        "A tiny model of these does not instantiate here, or does not run on token ids alone.\n",
        "| model type | reason |",
        "|---|---|",
        *(f"| {result['name']} | {_cell(result['reason'])} |" for result in groups["does not run"]),
        "\n## No decoders\n",
        "Entries of the table that are no decoders, by rules that look at config and class, not at names:\n",
    ]
    for rule in (SEQ2SEQ, ENCODER):
        ruled = ", ".join(result["name"] for result in groups["no decoder"] if result["reason"] == rule)
        parts.append(f"- {rule}. {ruled}.")
    return "\n".join(parts) + "\n"


_HEADER = """# Supported models

Written by `make sweep`; do not edit. transformers {transformers}, torch {torch}, CPU, float32.

Every architecture that transformers maps to `AutoModelForCausalLM` is shrunk to a tiny model that has each of its kinds
of layers, gets random weights, is built, and goes through these stages:

- (a) packed logits equal transformers' for each sequence alone;
- (b) generation with chunked prefill, decode and preemption gives transformers' greedy tokens;
- (c) packed sequences do not see each other, with a control that could fail;
- (d) `torch-compile` equals `torch-simple`.{left_out}

No code of this project names a model; an architecture not listed here that is built from the same parts works as well.

**{summary}.** A type that repeats another's class is marked with it.
"""


def _named(result: Result, aliases: dict[str, str]) -> str:
    original = aliases.get(result["name"])
    return f"{result['name']} (= {original})" if original else str(result["name"])


def _supported_row(result: Result, aliases: dict[str, str]) -> str:
    nodes = ", ".join(f"{count} {op}" for op, count in parts(result).items())
    error = result["stages"]["logits"]["detail"]
    return f"| {_named(result, aliases)} | {result['class']} | {nodes} | {error} |"


def _failed_row(result: Result, aliases: dict[str, str]) -> str:
    stage, _, reason = result["reason"].partition(": ")
    return f"| {_named(result, aliases)} | {result.get('class', '')} | {stage} | {_cell(reason)} |"


def _cell(reason: str) -> str:
    """A reason as a reader wants it: without the node's own print, paths and advice to authors."""
    short = re.split(r": %| The model's code there| \[\w+\.py:\d+\]$", reason)[0]
    short = re.sub(r"/\S*/site-packages/", "", short).replace("|", "/").replace("](", "] (")
    return short if len(short) <= 240 else short[:237] + "..."
