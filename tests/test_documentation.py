"""The pages that show code are run: what they define is built, served, and held to the model's own numbers."""

import re
import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import nn

from autodeploy import LLM, SamplingParams
from autodeploy.ops import OPS
from tests.ops.laws import Replay

DOCS = Path(__file__).resolve().parent.parent / "docs"


@contextmanager
def page(name: str) -> Iterator[types.ModuleType]:
    """A module that holds what the page's Python blocks define, run in order."""
    text = (DOCS / name).read_text(encoding="utf-8")
    module = types.ModuleType(f"page_{re.sub('[^a-z]', '_', name)}")
    sys.modules[module.__name__] = module
    known = set(OPS)
    try:
        for block in re.findall(r"^```python\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE):
            exec(compile(block, str(DOCS / name), "exec"), vars(module))
        yield module
    finally:
        del sys.modules[module.__name__]
        for added in set(OPS) - known:  # other tests enumerate the ops of this package
            del OPS[added]


def _serves(model: nn.Module) -> LLM:
    options = {"max_num_batched_tokens": 8, "page_size": 4, "max_model_len": 64, "skip_tokenizer_init": True}
    llm = LLM(model, **options)
    prompts = [[1, 5, 9], [7] * 20, [3]]
    outputs = llm.generate(
        [{"prompt_token_ids": prompt} for prompt in prompts],
        SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True),
        use_tqdm=False,
    )
    for prompt, output in zip(prompts, outputs, strict=True):
        tokens = list(prompt)
        with torch.no_grad():
            for _ in range(6):
                tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
        assert list(output.outputs[0].token_ids) == tokens[len(prompt) :]
    return llm


def test_adding_an_op_is_whole_and_short() -> None:
    text = (DOCS / "adding-an-op.md").read_text(encoding="utf-8")
    (mixer,) = [block for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL) if "with_states" in block]
    assert len(mixer.splitlines()) < 100
    with page("adding-an-op.md") as module:
        torch.manual_seed(0)
        with _serves(module.Model().eval()) as llm:
            assert llm.report.kernels["cached_fading_sum"] == {"torch": 1}
        op = module.fading_sum
        for seed in range(3):
            sample = {"x": torch.randn(1, 24, 8), "decay": torch.rand(8), "cu_seqlens": torch.tensor([0, 1, 10, 24])}
            torch.testing.assert_close(Replay(op, sample, seed).run(), op.reference(**sample), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["Mixture", "MixtureWithOps"])
def test_onboarding_a_mixture(name: str) -> None:
    with page("onboarding-a-mixture.md") as module:
        torch.manual_seed(0)
        model = getattr(module, name)().eval().requires_grad_(False)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.copy_(0.3 * torch.randn(parameter.shape))
        with _serves(model) as llm:
            rewrites, kernels = llm.report.rewrites(), llm.report.kernels
    assert llm.report.facts["isolation"] == "passed"
    loops = 2 if name == "Mixture" else 0
    assert (rewrites["roll_loops"], rewrites["match_causal_conv"], rewrites["match_attention"]) == (loops, 2, 1)
    mixers = (
        {"cached_delta_rule": 1, "cached_linear_attention": 1} if loops else {"cached_delta_rule": 1, "cached_ssd": 1}
    )
    assert {op: sum(kernels[op].values()) for op in mixers} == mixers


def test_every_test_that_the_page_about_serving_names_exists() -> None:
    named = re.findall(r"`(?:(\w+\.py)::)?(test_\w+)`", (DOCS / "serving.md").read_text(encoding="utf-8"))
    tests = {path.name: path.read_text(encoding="utf-8") for path in (DOCS.parent / "tests").rglob("test_*.py")}
    file, missing = "", []
    for given, test in named:
        file = given or file  # a test without a file is in that of the one before
        if f"def {test}(" not in tests.get(file, ""):
            missing.append(f"{file}::{test}")
    assert len(named) > 15 and not missing, missing
