"""Models from papers, with no help: mixtures, skipped blocks, recurrences as loops or as ops, all served alike."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from autodeploy import LLM, SamplingParams
from autodeploy.build import build
from autodeploy.compile.program import Program
from autodeploy.config import parse_options
from autodeploy.debug.packed_run import run_packed
from autodeploy.ops import delta_rule, ssd
from tests import research_models, research_recurrences, tiny
from tests.research_models import VOCAB


class DeltaNetOp(research_models.DeltaNet):
    """The loop as one call of the op: what an author changes for speed."""

    def mix(self, q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
        return delta_rule(q, k, v, beta, None, 1.0, None, None)


class Mamba2Op(research_models.Mamba2):
    """The loop as one call of the op."""

    def mix(self, u: Tensor, dt: Tensor, b: Tensor, c: Tensor) -> Tensor:
        rate = -self.log_rate.exp()
        return ssd(u, dt, rate, b[:, :, None], c[:, :, None], None, None, False, 0.0, None, None)


def _with_ops() -> nn.Module:
    return research_models.nemotron_flash(delta_net=DeltaNetOp, mamba2=Mamba2Op)


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, int]]] = {
    "open_elm": (research_models.open_elm, {"match_attention": 4}),
    "puzzle": (research_models.puzzle, {"match_attention": 3}),
    "nemotron_flash": (
        research_models.nemotron_flash,
        {"roll_loops": 4, "match_recurrences": 4, "match_causal_conv": 4, "match_attention": 1, "insert_cached_ops": 9},
    ),
    "nemotron_flash_with_ops": (_with_ops, {"roll_loops": 0, "match_causal_conv": 4, "insert_cached_ops": 9}),
    "recurrent": (
        research_recurrences.recurrent,
        {"roll_loops": 4, "match_recurrences": 3, "match_token_shift": 13, "insert_cached_ops": 17},
    ),
}


def _drawn(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return research_models.with_random_weights(make())


def _greedy(model: nn.Module, prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(count):
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


def _prompts() -> list[list[int]]:
    return [[token % VOCAB for token in prompt] for prompt in tiny.prompts(5, seed=3, longest=30)]


def _packed(program: Program, model: nn.Module) -> tuple[Tensor, Tensor]:
    rows = [torch.tensor(prompt) for prompt in _prompts()[:3]]
    with torch.no_grad():
        return run_packed(program, rows), torch.cat([model(row[None])[0] for row in rows])


@pytest.mark.parametrize("name", MODELS)
def test_is_served_like_any_other_module(name: str) -> None:
    make, rewrites = MODELS[name]
    model = _drawn(make)
    options = {"max_num_batched_tokens": 16, "page_size": 4, "max_model_len": 64, "skip_tokenizer_init": True}
    with LLM(model, **options) as llm:
        report = llm.report
        outputs = llm.generate(
            [{"prompt_token_ids": prompt} for prompt in _prompts()],
            SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True),
            use_tqdm=False,
        )
    assert report.facts["isolation"] == "passed"
    assert {key: report.rewrites().get(key, 0) for key in rewrites} == rewrites
    assert [list(output.outputs[0].token_ids) for output in outputs] == [
        _greedy(model, prompt, 8) for prompt in _prompts()
    ]


@pytest.mark.slow
def test_packed_logits_and_both_backends() -> None:
    model = _drawn(research_models.nemotron_flash)
    result, expected = _packed(build(model), model)
    limit = 1e-4 * float(expected.abs().max())
    torch.testing.assert_close(result, expected, rtol=1e-4, atol=limit)
    compiled, _ = _packed(build(model, parse_options({"compile_backend": "torch-compile"})), model)
    torch.testing.assert_close(compiled, result, rtol=1e-4, atol=limit)
