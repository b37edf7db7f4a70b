"""cached_attention by FlashInfer, over a stand-in for it: plans, their numbers, what is refused, whole models."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from autodeploy.build import build
from autodeploy.compile.program import Program
from autodeploy.config import EngineOptions, parse_options
from autodeploy.debug.packed_run import run_packed
from autodeploy.kernels import flashinfer as provider
from autodeploy.ops import cached_attention, rms_norm
from autodeploy.ops.norm import add_rms_norm
from autodeploy.runtime.engine import Engine
from autodeploy.runtime.request import SamplingParams
from autodeploy.transforms import pipeline
from autodeploy.transforms.lower.select_kernels import SelectKernels
from tests import tiny
from tests.captured import capture_with_checker, facts
from tests.engines import generated
from tests.kernels.flashinfer.fake import Recorded
from tests.kernels.paged_cases import Case

SIZES = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
SIZES |= {"intermediate_size": 64, "vocab_size": 256, "num_hidden_layers": 3}


def llama(**given: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **given})).to(torch.bfloat16)


def program(model: torch.nn.Module, patch: pytest.MonkeyPatch, *providers: str, **options: Any) -> Program:
    """A program for the CPU whose token mixers ask these providers."""
    patch.setattr(pipeline, "kernel_choice", lambda *_: SelectKernels(mixer_priority=providers))
    given = {"device": "cpu", "compile_backend": "torch-simple", "check_isolation": False, **options}
    return build(model, parse_options(given))


@pytest.mark.parametrize(
    "facts", [{}, {"causal": False}, {"sliding_window": 5}, {"softcap": 2.0}, {"sliding_window": 30, "softcap": 2.0}]
)
@pytest.mark.parametrize("counts", [[1, 1, 1], [70, 33, 1], [2, 0, 1]], ids=str)
def test_gives_what_the_op_gives(facts: dict[str, Any], counts: list[int], recorded: Recorded) -> None:
    provider.load()
    torch.manual_seed(0)
    Case([70, 50, 9], counts, widths=(64, 64), page_size=4, dtype=torch.bfloat16, **facts).check("flashinfer")
    (plan,) = recorded.plans
    assert recorded.runs == [plan["wrapper"]] == ["decode" if counts == [1, 1, 1] else "prefill"]


def test_a_plan_says_where_pages_are(recorded: Recorded) -> None:
    provider.load()
    case = Case([9, 4, 13], [1, 4, 2], heads=(8, 2), widths=(64, 64), page_size=4, dtype=torch.bfloat16)
    case.check("flashinfer")
    (plan,) = recorded.plans
    table = case.page_table.tolist()
    assert plan["qo_indptr"] == [0, 1, 5, 7] and plan["indptr"] == [0, 3, 4, 8]
    assert plan["indices"] == [*table[0][:3], *table[1][:1], *table[2][:4]] and plan["last_page_len"] == [1, 4, 1]
    assert plan["sizes"] == (8, 2, 64, 4) and plan["sm_scale"] == 0.125 and plan["window_left"] == -1


def test_a_plan_waits_for_the_copies_of_the_one_before(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    """They leave one buffer on the host."""
    provider.load()
    case = Case([9], [1], widths=(64, 64), dtype=torch.bfloat16)
    given = case.arguments()
    names = {"page_table": "page_table", "key_cache": "key_cache"}
    kernel = cached_attention.kernels["flashinfer"]
    assert kernel.plan_facts is not None
    plan = kernel.plan_facts(names, **given).start(torch.device("cpu"))
    seen: list[str] = []

    def note(what: str) -> None:
        seen.append(f"{what} {len(recorded.plans)}")

    event = SimpleNamespace(synchronize=lambda: note("wait"), record=lambda stream: note("record"))
    monkeypatch.setattr(plan, "_copied", event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    for _ in range(2):
        plan.prepare(given, given)
    assert seen == ["wait 0", "record 1", "wait 1", "record 2"]


@pytest.mark.parametrize(("heads", "uses"), [((8, 2), True), ((4, 2), False)])
def test_tensor_cores_are_for_many_heads_of_a_group(heads: tuple[int, int], uses: bool, recorded: Recorded) -> None:
    provider.load()
    Case([9], [1], heads=heads, widths=(64, 64), dtype=torch.bfloat16).check("flashinfer")
    assert recorded.plans[0]["use_tensor_cores"] is uses


@pytest.mark.parametrize(
    ("facts", "reason"),
    [
        ({"has_slopes": True}, "slopes"),
        ({"has_sinks": True}, "sinks"),
        ({"chunk_size": 8}, "chunks"),
        ({"widths": (80, 80)}, "heads of 80"),
        ({"widths": (64, 128)}, "values of 128"),
        ({"dtype": torch.float32}, "float32; there are kernels for bfloat16"),
    ],
    ids=str,
)
def test_refuses_with_a_reason(facts: dict[str, Any], reason: str, recorded: Recorded) -> None:
    provider.load()
    case = Case([5], [1], **{"widths": (64, 64), "dtype": torch.bfloat16, **facts})
    assert reason in (cached_attention.kernels["flashinfer"].supports(**case.arguments()) or "")


def test_one_plan_a_step_for_all_layers(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    provider.load()
    built = program(llama(), monkeypatch, "flashinfer")
    assert built.report.kernels["cached_attention"] == {"flashinfer": 3}
    engine = Engine(built, EngineOptions(max_num_batched_tokens=24, page_size=4), max_model_len=96)
    tokens = generated(engine, tiny.prompts(4, seed=3), SamplingParams(temperature=0, max_tokens=6, ignore_eos=True))
    num_steps = engine.stats().num_steps
    assert len(recorded.plans) == num_steps and len(recorded.runs) == 3 * num_steps
    assert {"decode", "prefill"} == {plan["wrapper"] for plan in recorded.plans}
    assert all(len(each) == 6 for each in tokens)


def test_whole_models_give_the_reference_s_logits(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    provider.load()
    rows = [torch.tensor(prompt) for prompt in tiny.prompts(3, seed=5)]
    expected = run_packed(program(llama(), monkeypatch), rows)
    found = run_packed(program(llama(), monkeypatch, "flashinfer"), rows)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)


def test_a_kept_graph_is_planned_as_it_was(recorded: Recorded, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its nodes know shapes and dtypes, and no device."""
    provider.load()
    llama().save_pretrained(tmp_path)
    rows, found = [torch.arange(20), torch.arange(7)], []
    for _ in range(2):
        monkeypatch.setattr(pipeline, "kernel_choice", lambda *_: SelectKernels(mixer_priority=("flashinfer",)))
        options = {"device": "cpu", "compile_backend": "torch-simple", "instant_on": False}
        built = build(str(tmp_path), parse_options(options))
        found.append(run_packed(built, rows))
    assert built.report.facts["graph"] == "restored" and len(built.graphs["text"].plans) == 1
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


def test_layers_with_other_facts_have_a_plan_of_their_own(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    provider.load()
    torch.manual_seed(0)
    kinds = ["full_attention", "sliding_attention", "full_attention"]
    config = Qwen3Config(**SIZES, layer_types=kinds, use_sliding_window=True, sliding_window=8)
    model = Qwen3ForCausalLM(config).to(torch.bfloat16)
    built = program(model, monkeypatch, "flashinfer")
    assert len(built.graphs["text"].plans) == 2
    run_packed(built, [torch.arange(30)])
    pairs = [recorded.plans[at]["window_left"] for at in range(len(recorded.plans))]
    assert set(pairs) == {-1, 7} and pairs.count(-1) == pairs.count(7)
    assert len(recorded.runs) == 3 * pairs.count(7)


def test_what_is_refused_goes_to_the_next_provider(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    provider.load()
    built = program(llama(head_dim=32), monkeypatch, "flashinfer", "cpu")
    assert built.report.kernels["cached_attention"] == {"cpu": 3} and built.graphs["text"].plans == ()
    assert any("heads of 32" in reason for reason in built.report.kernel_reasons["cached_attention"])


def test_compiled_graphs_do_without(recorded: Recorded) -> None:
    provider.load()
    why: Callable[..., str | None] = SelectKernels(compiled=True)._why_left
    assert "plans steps on the host" in (why(cached_attention.kernels["flashinfer"]) or "")
    assert SelectKernels()._why_left(cached_attention.kernels["flashinfer"]) is None


def test_steps_in_pieces_run_it_between_their_graphs(recorded: Recorded, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph repeats what is captured, padded to its size; the plan is that of the step itself."""
    provider.load()
    capture_with_checker(monkeypatch)
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    found = []
    for backend in ("torch-simple", "torch-cudagraph"):
        built = program(llama(), monkeypatch, "flashinfer", compile_backend=backend)
        options = EngineOptions(max_num_seqs=5, max_num_batched_tokens=24, page_size=4)
        engine = Engine(built, options, max_model_len=96)
        recorded.plans.clear()
        found.append(generated(engine, tiny.prompts(5, seed=3), params))
        assert len(recorded.plans) == engine.stats().num_steps
    assert found[0] == found[1]
    captured = facts(built)
    assert captured["whole_sizes"] == [] and set(captured["steps"]) == {"in pieces"}
    assert captured["not_captured"] == {"whole": "not capture-safe: cached_attention by flashinfer"}


def test_norms(recorded: Recorded) -> None:
    provider.load()
    x, weight = torch.randn(1, 7, 64).bfloat16(), torch.randn(64).bfloat16()
    facts: dict[str, Any] = {"weight": weight, "eps": 1e-6, "weight_offset": 0.0, "scale_in_float32": True}
    for op, given in ((rms_norm, {"x": x}), (add_rms_norm, {"x": x, "residual": x.flip(1)})):
        kernel = op.kernels["flashinfer"]
        assert kernel.supports(**given, **facts) is None
        torch.testing.assert_close(kernel.function(**given, **facts), op.reference(**given, **facts), rtol=0, atol=0)
        assert "offset" in (kernel.supports(**given, **(facts | {"weight_offset": 1.0})) or "")
        assert "float32" in (kernel.supports(**given, **(facts | {"weight": weight.float()})) or "")
