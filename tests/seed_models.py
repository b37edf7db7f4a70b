"""The seeds' models: an entry of benchmarks/seed_models.yaml goes in, a model without weights or a tiny one comes out.

`numbers` holds a tiny one to its own code: packed logits, and greedy tokens under chunking and preemption.
"""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from autodeploy.build import build
from autodeploy.config import parse_options
from autodeploy.debug.packed_run import run_packed
from autodeploy.debug.shrink import shrink, tiny_model
from autodeploy.debug.shrink_sizes import SPECIAL_IDS, VOCAB_SIZE
from autodeploy.models.instantiate import instantiate
from tests import research_models
from tests.research_models import PuzzleLayer
from tests.sweep.reference import generated, greedy, logits_of
from tests.sweep.stages import NEW_TOKENS, PROMPTS, ROWS, TOLERANCE, Mismatch, serve

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
DATA: dict[str, Any] = yaml.safe_load((BENCHMARKS / "seed_models.yaml").read_text(encoding="utf-8"))

WIDTH, HEADS, HEAD_DIM = 64, 16, 8
"""of tiny research models"""

Fields = dict[str, Any]


def without_weights(fields: Fields) -> nn.Module:
    """The model at its real dimensions, bfloat16, parameters on meta."""
    if "module" not in fields:
        return instantiate(hf_config(fields), dtype=torch.bfloat16)
    with torch.device("meta"):
        return _research_model(fields).to(torch.bfloat16).eval().requires_grad_(False)


def tiny(fields: Fields) -> nn.Module:
    """A float32 model of the same family with each of its kinds of layers, and random weights."""
    if "module" not in fields:
        return tiny_model(shrink(hf_config(fields)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return research_models.with_random_weights(_research_model(_SHRINK[fields["module"]](fields)))


def tiny_key(fields: Fields) -> str:
    """Entries with equal keys have the same tiny model."""
    if "module" in fields:
        return repr(_SHRINK[fields["module"]](fields))
    return shrink(hf_config(fields)).to_json_string()


def numbers(model: nn.Module) -> str:
    """Hold a built and served model to its own code; returns the largest error of a logit and remarks.

    Raises:
        Mismatch: logits or tokens differ. As `build`, which checks that packed sequences do not see each other.
    """
    generator = torch.Generator().manual_seed(0)
    rows, prompts = (
        [torch.randint(3, VOCAB_SIZE - SPECIAL_IDS, (length,), generator=generator) for length in lengths]
        for lengths in (ROWS, PROMPTS)
    )
    program = build(model, parse_options({"device": "cpu"}))
    expected = torch.cat([logits_of(model, row[None]) for row in rows])
    error = float((run_packed(program, rows) - expected).abs().max() / expected.abs().max())
    if not error <= TOLERANCE:
        raise Mismatch(f"logits differ by {error:.3g} of the largest (at most {TOLERANCE:g})")
    tokens, num_preemptions = serve(program, prompts)
    ties = 0
    for prompt, found in zip(prompts, tokens, strict=True):
        whole = greedy(model, prompt.tolist(), NEW_TOKENS)
        own = generated(model, prompt.tolist(), NEW_TOKENS) if isinstance(model, PreTrainedModel) else whole.tokens
        for others in (found, own):
            is_same, needed_a_tie = whole.agrees(others)
            if not is_same:
                raise Mismatch(f"prompt of {len(prompt)} tokens: {others}, a run of the whole sequence {whole.tokens}")
            ties += needed_a_tie
    return f"{error:.0e}; {num_preemptions} preemptions" + (f"; {ties} ties" if ties else "")


def hf_config(fields: Fields) -> PreTrainedConfig:
    """The config of an entry that is no research model."""
    fields = dict(fields)
    config: PreTrainedConfig = AutoConfig.for_model(fields.pop("type"), **fields)
    return config


def _research_model(fields: Fields) -> nn.Module:
    fields = dict(fields)
    make: Callable[..., nn.Module] = getattr(research_models, fields.pop("module"))
    if "layers" in fields:
        fields["layers"] = [PuzzleLayer(*kinds) for count, *kinds in fields["layers"] for _ in range(count)]
    return make(**fields)


def _shrunken_open_elm(fields: Fields) -> Fields:
    """One layer for each number of heads, with as many heads."""
    heads = fields["heads"]
    kept = [at for at, count in enumerate(heads) if count not in heads[:at]]
    widths = [fields["widths"][at] * WIDTH // fields["hidden"] for at in kept]
    sizes = {"hidden": WIDTH, "size": HEAD_DIM, "vocab": VOCAB_SIZE}
    return fields | sizes | {"heads": [heads[at] for at in kept], "widths": widths}


def _shrunken_puzzle(fields: Fields) -> Fields:
    """One layer of each kind, in order; key-value heads as they are, widths in proportion."""

    def width(size: int | str | None) -> int | str | None:
        return size * WIDTH // fields["hidden"] if isinstance(size, int) else size

    kinds = dict.fromkeys((kv_heads, width(size)) for _, kv_heads, size in fields["layers"])
    sizes = {"hidden": WIDTH, "heads": HEADS, "size": HEAD_DIM, "vocab": VOCAB_SIZE}
    return fields | sizes | {"layers": [[1, *kind] for kind in kinds]}


def _shrunken_nemotron_flash(fields: Fields) -> Fields:
    """The shortest beginning with every letter twice, or all of the pattern."""
    pattern: str = fields["pattern"]
    starts: Sequence[str] = list(itertools.accumulate(pattern))
    kept = next((start for start in starts if all(start.count(letter) > 1 for letter in set(pattern))), pattern)
    heads = {"heads": 4, "kv_heads": max(1, 4 * fields["kv_heads"] // fields["heads"]), "mamba_heads": 8}
    sizes = {"hidden": WIDTH, "size": HEAD_DIM, "mamba_size": HEAD_DIM, "states": 16, "width": 3 * WIDTH}
    return fields | heads | sizes | {"pattern": kept, "vocab": VOCAB_SIZE}


_SHRINK: dict[str, Callable[[Fields], Fields]] = {
    "open_elm": _shrunken_open_elm,
    "puzzle": _shrunken_puzzle,
    "nemotron_flash": _shrunken_nemotron_flash,
}
