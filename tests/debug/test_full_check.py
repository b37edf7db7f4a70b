"""full check: real weights in the real build against transformers; an honest build passes, a wrong one does not."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from autodeploy.compile.program import Program
from autodeploy.config import parse_options
from autodeploy.debug import full_check as module
from autodeploy.debug.check import check
from autodeploy.debug.full_check import full_check
from autodeploy.debug.texts import PROMPTS, zen_of_python
from autodeploy.errors import ConfigError, InvalidRequestError, OutOfMemoryError, UnsupportedModelError
from tests import tiny
from tests.threads import torch_threads

TEXT = ("a note", "Simple is better than complex.")
PROMPTS_HERE = ["a tiny model", [5, 6, 7]]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    with torch_threads(1):
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("llama", tmp_path_factory.mktemp("full") / "model")


def test_an_honest_build_passes_and_the_figures_are_those_of_transformers(folder: Path) -> None:
    steps: list[str] = []
    report = full_check(str(folder), prompts=PROMPTS_HERE, max_tokens=8, perplexity=TEXT, progress=steps.append)
    assert report.passed, report.rules
    assert [result.ours.num_equal_tokens for result in report.prompts] == [8, 8]
    assert all(result.ours.top_1 == 1.0 and result.transformers is None for result in report.prompts)
    assert report.facts["dtype"] == "float32" and report.facts["parameters"] == 83280
    assert any("prompt 2 of 2" in step for step in steps) and any("perplexity" in step for step in steps)

    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt = torch.tensor([[5, 6, 7]])
    generated = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False, min_new_tokens=8, max_new_tokens=8
    )
    assert report.prompts[1].token_ids == generated[0, 3:].tolist()
    ids = torch.tensor([tiny.tokenizer().encode(TEXT[1])])
    found = report.perplexity
    assert found is not None and (found.source, found.num_tokens) == ("a note", ids.shape[1])
    with torch.no_grad():
        expected = math.exp(model(ids, labels=ids).loss)
    assert math.isclose(found.reference, expected, rel_tol=1e-4) and math.isclose(found.ours, expected, rel_tol=1e-4)


def test_in_bfloat16_transformers_rounds_as_well(folder: Path) -> None:
    report = check(str(folder), parse_options({"dtype": "bfloat16"}), full=True, prompts=["hello"], perplexity=TEXT)
    (result,) = report.prompts
    assert result.transformers is not None and len(result.token_ids) == module.MAX_TOKENS
    for run in (result.ours, result.transformers):
        assert 1e-7 < run.kl_mean < 0.1 and run.largest_error < 2.0
    assert report.perplexity is not None and report.perplexity.transformers != report.perplexity.reference


def _damaged(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """The build's logits are multiplied: the same tokens, another distribution."""
    honest = module.build

    def build(*arguments: Any, **named: Any) -> Program:
        program = honest(*arguments, **named)
        text = program.graphs["text"]
        scaled = dataclasses.replace(text, function=lambda *inputs: text.function(*inputs) * factor)
        return dataclasses.replace(program, graphs={"text": scaled})

    monkeypatch.setattr(module, "build", build)


def test_another_distribution_fails_though_the_tokens_are_the_same(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _damaged(monkeypatch, 1.1)
    report = full_check(str(folder), prompts=["hello"], max_tokens=4, perplexity=TEXT)
    assert report.prompts[0].ours.num_equal_tokens == 4
    assert [rule.passed for rule in report.rules] == [True, False, False]


def test_other_tokens_fail(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _damaged(monkeypatch, -1.0)
    report = full_check(str(folder), prompts=["hello"], max_tokens=4)
    assert report.prompts[0].ours.num_equal_tokens == 0 and not report.rules[0].passed


class _Mean(nn.Module):
    """Logits from the mean of the tokens so far."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding = nn.Embedding(40, 8, _weight=torch.randn(40, 8, generator=generator))
        self.head = nn.Parameter(torch.randn(8, 40, generator=generator))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        q = k = torch.zeros_like(x)[:, None]
        mean = torch.nn.functional.scaled_dot_product_attention(q, k, x[:, None], is_causal=True)
        return mean[:, 0] @ self.head


def test_a_module_without_tokenizer_is_tried_on_random_tokens() -> None:
    model = _Mean().bfloat16()
    report = full_check(model, max_tokens=3)
    assert [result.num_prompt_tokens for result in report.prompts] == list(module.RANDOM_LENGTHS)
    assert report.perplexity is None and all(result.prompt is None for result in report.prompts)
    assert all(result.transformers is not None for result in report.prompts)
    assert model.head.dtype == torch.bfloat16, "the user's module is left as it was"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"prompts": ["text"]}, "no tokenizer"), ({"prompts": [[]]}, "empty"), ({"perplexity": TEXT}, "no tokenizer")],
    ids=["text", "empty", "perplexity"],
)
def test_texts_that_cannot_be_run_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidRequestError, match=message):
        full_check(_Mean(), **arguments)


def test_what_cannot_be_compared_is_refused_before_it_is_built(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "build", lambda *_, **__: pytest.fail("was built"))
    with pytest.raises(ConfigError, match="load_format='dummy' makes weights up"):
        full_check(str(folder), parse_options({"load_format": "dummy"}))
    with pytest.raises(ConfigError, match="max_tokens=0"):
        full_check(str(folder), max_tokens=0)
    monkeypatch.setattr(module, "available_bytes", lambda _: 300_000)
    with pytest.raises(OutOfMemoryError, match=r"83,280 parameters in float32.*check without --full"):
        full_check(str(folder))


def test_a_checkpoint_that_transformers_cannot_load_says_so(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> nn.Module:
        raise RuntimeError("no idea")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", broken)
    with pytest.raises(UnsupportedModelError, match=r"transformers itself cannot load.*no idea"):
        full_check(str(folder), prompts=[[1, 2]], max_tokens=1, perplexity=TEXT)


def test_texts_need_a_full_check(folder: Path) -> None:
    with pytest.raises(ConfigError, match="prompts: a check of a tiny clone has no texts"):
        check(str(folder), prompts=["hello"])  # type: ignore[call-overload]


def test_the_built_in_texts() -> None:
    text = zen_of_python()
    assert text.startswith("The Zen of Python, by Tim Peters") and text.endswith("let's do more of those!")
    lengths = [len(prompt.split()) for prompt in PROMPTS]
    assert lengths == sorted(lengths) and lengths[-1] > 150
