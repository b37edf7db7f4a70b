"""build: Hugging Face models and users' own modules become programs that generate what the original does."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autodeploy.build import build, resolve_device
from autodeploy.compile.program import Program
from autodeploy.config import EngineOptions, parse_options
from autodeploy.errors import CaptureError, ConfigError, GraphLevelError
from autodeploy.runtime.engine import Engine
from autodeploy.runtime.request import SamplingParams
from autodeploy.runtime.states import StatePlan, plan_states
from tests import tiny
from tests.engines import generated
from tests.graphs import Sketch, attention_model, causal_sdpa
from tests.ops.mixers import decaying_sum

CROWDED = EngineOptions(max_num_batched_tokens=16, page_size=4, max_num_seqs=6)


def _generate(program: Program, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    engine = Engine(program, CROWDED, max_model_len=96)
    tokens = _run(engine, prompts, num_tokens)
    _check_prefix_cache(engine, prompts, tokens)
    return tokens


def _check_prefix_cache(engine: Engine, prompts: list[list[int]], expected: list[list[int]]) -> None:
    """A prompt gets the same tokens when it starts behind what it left the time before."""
    longest = max(range(len(prompts)), key=lambda at: len(prompts[at]))
    num_tokens = len(expected[longest])
    assert _run(engine, [prompts[longest]], num_tokens) == [expected[longest]]
    num_hits = engine.stats().prefix_cache_hit_tokens
    assert _run(engine, [prompts[longest]], num_tokens) == [expected[longest]]
    assert engine.stats().prefix_cache_hit_tokens > num_hits


def _run(engine: Engine, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    return generated(engine, prompts, SamplingParams(temperature=0.0, max_tokens=num_tokens, ignore_eos=True))


@pytest.mark.parametrize("name", tiny.TINY)
def test_generates_what_transformers_generates(name: str) -> None:
    model = tiny.TINY[name]()
    program = build(model)
    assert program.report.facts["isolation"] == "passed"
    prompts = tiny.prompts(8, seed=1)
    with torch.no_grad():
        expected = [
            model.generate(
                torch.tensor([prompt]), max_new_tokens=10, do_sample=False, eos_token_id=None, pad_token_id=0
            )[0, len(prompt) :].tolist()
            for prompt in prompts
        ]
    assert _generate(program, prompts, 10) == expected


@pytest.mark.parametrize("name", tiny.HYBRID)
def test_recurrent_states_survive_chunks_and_preemption(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.HYBRID[name]()
    program = build(model)
    assert program.report.facts["isolation"] == "passed"
    cached = next(report for report in program.report.transforms if report.name == "insert_cached_ops")
    assert cached.rewritten == cached.expected and {spec.group for spec in program.states} >= {"slots", "full"}
    prompts = tiny.prompts(6, seed=3, longest=20)
    options = {"max_new_tokens": 14, "do_sample": False, "eos_token_id": None, "pad_token_id": tiny.PAD}
    with torch.no_grad():
        expected = [model.generate(torch.tensor([p]), **options)[0, len(p) :].tolist() for p in prompts]

    def few_pages(*args: Any, **kwargs: Any) -> StatePlan:
        plan = plan_states(*args, **kwargs)
        groups = tuple(dataclasses.replace(group, num_pages=1 + 96 // CROWDED.page_size) for group in plan.groups)
        return dataclasses.replace(plan, groups=groups)

    monkeypatch.setattr("autodeploy.runtime.engine.plan_states", few_pages)
    engine = Engine(program, CROWDED, max_model_len=96)
    assert _run(engine, prompts, 14) == expected
    assert engine.stats().num_preemptions > 0
    _check_prefix_cache(engine, prompts, expected)
    # Many drafts, most of them wrong: recurrent states are rolled back.
    monkeypatch.undo()
    drafting = dataclasses.replace(CROWDED, speculative_config={"prompt_lookup_min": 1})
    engine = Engine(program, drafting, max_model_len=96)
    assert _run(engine, prompts, 14) == expected
    assert engine.stats().draft_tokens > engine.stats().accepted_tokens


def _whole_sequence_greedy(model: nn.Module, prompt: list[int], num_tokens: int) -> list[int]:
    """The slow truth for a module without a cache: run everything again for every token."""
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(num_tokens):
            tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    return tokens[len(prompt) :]


def _hybrid(self: nn.Module, x: Tensor) -> Tensor:
    x = x + self.positions[: x.shape[1]]
    x = self.first(x) + decaying_sum(x, self.decay, None)
    return self.second(self.norm(x))


def _own_modules() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    hybrid = Sketch(
        _hybrid,
        first=attention_model(causal_sdpa).layer,
        second=attention_model(causal_sdpa, kv_heads=4).layer,
        norm=nn.LayerNorm(16),
        decay=nn.Parameter(torch.rand(16)),
        positions=torch.randn(96, 16),
    )
    return {"attention": attention_model(causal_sdpa), "hybrid": hybrid.eval()}


@pytest.mark.parametrize("name", _own_modules())
def test_a_users_own_module_deploys_like_any_other(name: str) -> None:
    model = _own_modules()[name]
    prompts = [[index % 32 for index in range(start, start + length)] for start, length in ((0, 1), (5, 7), (9, 30))]
    expected = [_whole_sequence_greedy(model, prompt, 12) for prompt in prompts]
    assert _generate(build(model), prompts, 12) == expected


def test_a_hugging_face_module_brings_its_own_limits() -> None:
    program = build(tiny.TINY["llama"]())
    assert program.max_model_len == tiny.MAX_LENGTH and program.eos_token_ids == (tiny.EOS,)
    own = build(attention_model(causal_sdpa))
    assert own.max_model_len is None and own.eos_token_ids == ()


def test_report_says_what_was_done() -> None:
    report = build(tiny.TINY["llama"]()).report
    layers = 3
    assert {name: count for name, count in report.rewrites().items() if count and name != "drop_no_ops"} == {
        "match_attention": layers,
        "match_linear": 7 * layers + 1,
        "fuse_qkv": layers,
        "fuse_gate_up": layers,
        "fuse_add_rms_norm": 2 * layers,
        "insert_cached_ops": layers,
        "gather_logits": 1,
        "select_kernels": sum(
            sum(counts.values()) for name, counts in report.kernels.items() if name != "choose_tokens"
        ),
    }
    assert list(report.seconds) == [
        "resolve", "capture", "canonicalize", "fuse", "cache", "quantize", "lower", "load", "compile", "check",
    ]  # fmt: skip
    assert report.facts["weight_bytes"] > 0 and report.facts["dtype"] == "float32"


@pytest.mark.parametrize("transform", ["fuse_qkv", "fuse_gate_up", "fuse_add_rms_norm", "drop_no_ops"])
def test_fusions_can_be_switched_off_one_by_one(transform: str) -> None:
    model = tiny.TINY["llama"]()
    prompts = tiny.prompts(3, seed=2)
    off = parse_options({"transforms": {transform: {"enabled": False}}})
    assert _generate(build(model, off), prompts, 6) == _generate(build(model), prompts, 6)


def test_an_architecture_that_cannot_be_captured_is_refused_by_module() -> None:
    class Dispatch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, : int(x.sum())] if bool(x.mean() > 0) else x

    with pytest.raises(CaptureError, match=r"dispatch \(Dispatch\)"):
        build(Sketch(lambda self, x: self.dispatch(x), dispatch=Dispatch()))


class _RunningMean(nn.Module):
    """A mixer that nobody knows: a sum over all tokens so far."""

    def forward(self, x: Tensor) -> Tensor:
        return x.cumsum(1) / 2


class _Fibonacci(nn.Module):
    """A loop over tokens that looks two steps back, which a recurrence cannot say."""

    def forward(self, x: Tensor) -> Tensor:
        one, two, rows = torch.zeros_like(x[:, 0]), torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            one, two = x[:, t] + 0.5 * one + 0.1 * two, one
            rows.append(one)
        return torch.stack(rows, dim=1)


@pytest.mark.parametrize(
    ("mixer", "names"),
    [
        (_RunningMean(), r"cumsum\.default mixes tokens and no transform knows it.*in module mixer at .*test_build"),
        (_Fibonacci(), r"a loop over tokens.*in module mixer at .*test_build.*looks further back than one step"),
    ],
)
def test_an_unknown_mixer_is_refused_by_name(mixer: nn.Module, names: str) -> None:
    with pytest.raises(GraphLevelError, match=rf"{names}.*docs/adding-an-op\.md"):
        build(Sketch(lambda self, x: self.mixer(x), mixer=mixer))


def test_devices() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    for wanted in ("gpu", "mps", "nonsense:0"):
        with pytest.raises(ConfigError, match="device must be"):
            resolve_device(wanted)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="has none"):
            resolve_device("cuda")


def test_module_with_another_dtype_than_asked_for() -> None:
    with pytest.raises(ConfigError, match=r"module\.to\(torch\.bfloat16\)"):
        build(tiny.TINY["llama"](), parse_options({"dtype": "bfloat16"}))


def test_a_token_costs_the_experts_it_chooses() -> None:
    model = tiny.TINY["gpt_oss"]()
    program = build(model)
    matrices = {name: p.numel() for name, p in model.named_parameters() if p.dim() > 1 and "sinks" not in name}
    experts = sum(count for name, count in matrices.items() if name.endswith(("gate_up_proj", "down_proj")))
    biases = sum(count for name, count in matrices.items() if name.endswith("proj_bias"))
    table = matrices["model.embed_tokens.weight"]
    head = matrices["lm_head.weight"]
    dense = sum(matrices.values()) - experts - biases - table - head
    config = model.config
    chosen = experts * config.num_experts_per_tok // config.num_local_experts
    assert program.flops_per_token == 2 * (dense + chosen) and program.flops_per_logits_row == 2 * head
    assert program.step_weight_bytes == program.weight_bytes - 4 * (experts - chosen + table)
