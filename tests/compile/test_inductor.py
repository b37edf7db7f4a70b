"""Inductor compiles a model once: whatever steps come later, nothing is compiled again."""

import random

import torch
from torch._dynamo.utils import counters

from autodeploy.build import build
from autodeploy.compile.inductor import num_compilations
from autodeploy.config import parse_options
from autodeploy.runtime.engine import Engine
from autodeploy.runtime.request import SamplingParams
from tests import tiny


def test_nothing_recompiles_in_steady_state() -> None:
    """Batches of 1 to 12 sequences, prompts of one token to many chunks, known prefixes, drafts, sampling."""
    before = num_compilations()
    options = parse_options(
        {
            "compile_backend": "torch-compile",
            "max_num_seqs": 12,
            "max_num_batched_tokens": 48,
            "kv_cache_memory_bytes": 1 << 22,
            "speculative_config": {"method": "ngram", "num_speculative_tokens": 3},
        }
    )
    program = build(tiny.TINY["qwen3"](), options)
    compiled = num_compilations()
    assert compiled - before == program.report.facts["compilations"] == 1
    engine = Engine(program, options.engine)
    source, frames = random.Random(0), counters["frames"]["total"]
    shapes: set[int] = set()
    opening = [source.randrange(256) for _ in range(40)]
    for wave in range(6):
        for at in range(source.randint(1, 12)):
            prompt = [source.randrange(256) for _ in range(source.choice((1, 2, 7, 33, 130)))]
            if at % 3 == 0:
                prompt = opening + prompt  # a prefix that is known from the second wave on
            if at % 3 == 1:
                prompt = prompt[:4] * 8  # what n-grams are found in
            greedy = SamplingParams(max_tokens=source.randint(1, 12), temperature=0.0, ignore_eos=True)
            sampled = SamplingParams(max_tokens=5, temperature=1.0, top_p=0.9, seed=at, ignore_eos=True)
            engine.add_request(f"{wave}.{at}", prompt, sampled if at % 4 == 3 else greedy)
        while engine.has_unfinished_requests():
            engine.step()
            shapes.add(engine.stats().num_running)
    stats = engine.stats()
    assert stats.num_drafts and stats.prefix_cache_hit_tokens and len(shapes) > 5, "the mix was none"
    assert num_compilations() == compiled, "a step made Inductor compile"
    assert counters["frames"]["total"] == frames, "a step went through the tracer of torch.compile"


def test_a_compilation_is_counted() -> None:
    """Else the test above could not fail."""
    before = num_compilations()
    torch._dynamo.reset()
    torch.compile(lambda x: x.sin() + 1)(torch.ones(3))
    assert num_compilations() == before + 1
