"""check: an honest pipeline passes, and whatever is broken on purpose is named, with the place where it shows."""

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from transformers import LlamaConfig

from autodeploy.capture.export import capture
from autodeploy.compile.capture import Work
from autodeploy.compile.graphed_choice import GraphedChoice
from autodeploy.config import parse_options
from autodeploy.debug.backend_runs import COMPARED
from autodeploy.debug.capture_checker import CaptureChecker
from autodeploy.debug.check import check
from autodeploy.debug.check_report import FAILED, CheckReport, CheckRow
from autodeploy.debug.shrink import tiny_model
from autodeploy.errors import TransformError
from autodeploy.graph.model_graph import ModelGraph
from autodeploy.graph.transform import TransformResult
from autodeploy.ops.op import OPS, Kernel
from autodeploy.transforms.pipeline import default_pipeline
from tests import tiny
from tests.captured import capture_with_checker
from tests.graphs import Sketch, attention_model, causal_sdpa
from tests.ops.mixers import decaying_sum

aten = torch.ops.aten
TRANSFORMS = {
    name: transform
    for name, transform in default_pipeline(torch.device("cpu")).transforms().items()
    if transform.enabled
}
LAST_OF_STAGES = ("drop_no_ops", "fuse_add_rms_norm", "gather_logits", "select_kernels")
"""broken by default here; `test_mutations.py` breaks every transform, each in a model in which it has work to do"""
Damage = Callable[[ModelGraph], None]


def _hybrid() -> nn.Module:
    """Attention, a recurrence called without boundaries, positions counted by `arange`, norms by torch."""

    def body(self: nn.Module, x: Tensor) -> Tensor:
        x = x + self.positions(torch.arange(x.shape[1], device=x.device))
        return self.norm(self.layer(x) + decaying_sum(x, self.decay, None))

    torch.manual_seed(0)
    parts = {"positions": nn.Embedding(64, 16), "norm": nn.LayerNorm(16), "decay": nn.Parameter(torch.rand(16))}
    return Sketch(body, layer=attention_model(causal_sdpa).layer, **parts)


@pytest.fixture(scope="module")
def small() -> nn.Module:
    """One layer of RMSNorm, rotary, grouped queries and gated SiLU."""
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    return tiny_model(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))


@pytest.fixture
def captured_once(small: nn.Module, captured: ModelGraph, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks of `small` get copies of one graph: what is broken afterwards is what these tests are about."""

    def copied(model: nn.Module) -> ModelGraph:
        return dataclasses.replace(captured, module=copy.deepcopy(captured.module), weights=dict(captured.weights))

    monkeypatch.setattr("autodeploy.debug.check.capture", copied)


@pytest.fixture(scope="module")
def captured(small: nn.Module) -> ModelGraph:
    return capture(small)


def _culprit(report: CheckReport) -> CheckRow:
    assert not report.passed and report.culprit is not None
    return report.culprit


@pytest.mark.parametrize("name", ["gemma3_text", "gpt2"])
def test_an_honest_pipeline_passes(name: str) -> None:
    report = check(tiny.TINY[name]())
    assert report.passed, report.culprit
    assert [row.name for row in report.rows if row.transform] == list(TRANSFORMS), "every transform was checked"
    assert [row.name for row in report.rows if not row.transform] == ["capture", "packing", "replay"]
    assert all(row.error is not None and row.error <= row.tolerance for row in report.rows if row.tolerance)
    last = report.rows[-1].against_original
    assert last is not None and last.relative_error < 1e-5 and last.top_1_agreement == 1.0


def test_a_module_of_ones_own_passes() -> None:
    report = check(_hybrid())
    assert report.passed, report.culprit
    rewritten = {row.name: row.transform.rewritten for row in report.rows if row.transform}
    assert rewritten["bind_boundaries"] == rewritten["use_position_ids"] == 1


def test_in_bfloat16_errors_are_those_of_bfloat16(small: nn.Module) -> None:
    report = check(small, parse_options({"dtype": "bfloat16"}))
    assert report.passed, report.culprit
    last = report.rows[-1].against_original
    assert last is not None and 1e-4 < last.relative_error < 0.1 and 0 < last.kl_divergence < 0.1


@pytest.mark.usefixtures("captured_once")
def test_rounded_weights_pass_and_scales_of_others_are_named(small: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    options = parse_options({"quantization": "int8"})
    report = check(small, options)
    assert report.passed, report.culprit
    rounded = next(row for row in report.rows if row.name == "quantize_weights")
    assert rounded.error is not None and 1e-3 < rounded.error < 0.3
    op = OPS["quantized_linear"]

    def upside_down(x: Tensor, weight: Tensor, scales: Tensor, *others: Any) -> Tensor:
        return op.reference(x, weight, scales.flip(-1), *others)

    monkeypatch.setitem(op.kernels, "cpu", Kernel("cpu", upside_down, lambda **_: None))
    culprit = _culprit(check(small, options))
    assert culprit.name == "select_kernels" and "quantized_linear" in culprit.note


def _scale(graph: ModelGraph) -> None:
    """The result of one product or sum in the middle grows by a hundredth."""
    nodes = [
        node
        for node in graph.graph.nodes
        if node.op == "call_function" and isinstance(node.meta["val"], Tensor) and node.meta["val"].is_floating_point()
    ]
    node = nodes[len(nodes) // 2]
    users = list(node.users)
    scaled = graph.call(aten.mul.Tensor, node, 1.01, before=node.next, like=node)
    for user in users:
        user.replace_input_with(node, scaled)


def _drop_a_term(graph: ModelGraph) -> None:
    """The last sum of two tensors loses one of them."""
    sums = [
        n for n in graph.nodes(aten.add.Tensor) + graph.nodes(OPS["add_rms_norm"]) if isinstance(n.args[1], fx.Node)
    ]
    node = sums[-1]
    if node.target == aten.add.Tensor:
        node.replace_all_uses_with(node.args[0])
    else:
        node.update_arg(1, graph.call(aten.mul.Tensor, node.args[1], 0.0, before=node))


def _break(monkeypatch: pytest.MonkeyPatch, name: str, damage: Damage) -> None:
    """The transform does its work and then some."""
    kind = type(TRANSFORMS[name])
    honest = kind.apply

    def apply(self: Any, graph: ModelGraph) -> TransformResult:
        result = honest(self, graph)
        damage(graph)
        return result

    monkeypatch.setattr(kind, "apply", apply)


@pytest.mark.usefixtures("captured_once")
@pytest.mark.parametrize(
    ("name", "damage"),
    [
        pytest.param(name, damage, marks=() if name in LAST_OF_STAGES and damage is _scale else pytest.mark.slow)
        for name in TRANSFORMS
        for damage in (_scale, _drop_a_term)
    ],
)
def test_any_broken_transform_is_named(
    name: str, damage: Damage, small: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    _break(monkeypatch, name, damage)
    culprit = _culprit(check(small))
    assert culprit.name == name
    assert f"last changed by {name}" in culprit.note and "modeling_llama.py" in culprit.note


def _first(op: str) -> Callable[[ModelGraph], fx.Node]:
    return lambda graph: graph.nodes(OPS[op])[0]


def _set(op: str, parameter: str, value: Any) -> Damage:
    """An argument of the first such node becomes another value, or another argument by name."""

    def damage(graph: ModelGraph) -> None:
        node = graph.nodes(OPS[op])[0]
        names = list(OPS[op].parameters)
        other = node.args[names.index(value)] if value in names else value
        node.update_arg(names.index(parameter), other)

    return damage


def _swap_parts(op: str) -> Damage:
    """Two parts of the first split are taken for each other."""

    def damage(graph: ModelGraph) -> None:
        first, second = sorted(graph.nodes(aten.split_with_sizes.default)[0].users, key=lambda item: item.args[1])[1:]
        first.update_arg(1, second.args[1])
        second.update_arg(1, first.args[1] - 1)

    return damage


def _shift_positions(graph: ModelGraph) -> None:
    node = next(n for n in graph.nodes(aten.select.int))
    users = list(node.users)
    shifted = graph.call(aten.add.Tensor, node, 1, before=node.next)
    for user in users:
        user.replace_input_with(node, shifted)


def _forget_boundaries(graph: ModelGraph) -> None:
    _set("decaying_sum", "cu_seqlens", None)(graph)


def _move_a_boundary(graph: ModelGraph) -> None:
    """The border after eight tokens moves to seven; no sequence that is alone has one there."""
    (node,) = graph.nodes(decaying_sum)
    is_eight = graph.call(aten.eq.Scalar, node.args[2], 8, before=node)
    node.update_arg(2, graph.call(aten.masked_fill.Scalar, node.args[2], is_eight, 7, before=node))


def _take_one_row_too_early(graph: ModelGraph) -> None:
    node = graph.nodes(aten.index_select.default)[-1]
    earlier = graph.call(aten.clamp.default, node.args[2], 0, 3, before=node)
    node.update_arg(2, earlier)


REALISTIC: dict[str, tuple[str, Damage]] = {
    "sees the future": ("match_attention", _set("attention", "causal", False)),
    "another scale": ("match_attention", _set("attention", "scale", 1.0)),
    "values taken for keys": ("fuse_qkv", _swap_parts("split_with_sizes")),
    "another activation": ("fuse_gate_up", _set("gated_activation", "activation", "relu")),
    "the residual lost": ("fuse_add_rms_norm", _set("add_rms_norm", "residual", "x")),
    "a window that is not there": ("insert_cached_ops", _set("cached_attention", "sliding_window", 3)),
    "pages taken from the wrong rows": ("insert_cached_ops", _set("cached_attention", "value_cache", "key_cache")),
    "wrong rows of logits": ("gather_logits", _take_one_row_too_early),
}


@pytest.mark.usefixtures("captured_once")
@pytest.mark.parametrize("what", REALISTIC)
def test_a_plausible_mistake_is_named(what: str, small: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    name, damage = REALISTIC[what]
    _break(monkeypatch, name, damage)
    culprit = _culprit(check(small))
    assert culprit.name == name, culprit.note
    assert "layers.0" in culprit.note or "lm_head" in culprit.note or name == "gather_logits", culprit.note


def test_wrong_positions_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    _break(monkeypatch, "use_position_ids", _shift_positions)
    assert _culprit(check(_hybrid())).name == "use_position_ids"


def test_wrong_boundaries_show_when_sequences_are_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    _break(monkeypatch, "bind_boundaries", _move_a_boundary)
    culprit = _culprit(check(_hybrid()))
    assert culprit.name == "packing" and culprit.note.startswith("packed: first seen at %decaying_sum")
    assert culprit.note.endswith("last changed by bind_boundaries")


def test_a_mixer_that_nobody_gave_boundaries_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    _break(monkeypatch, "bind_boundaries", _forget_boundaries)
    culprit = _culprit(check(_hybrid()))
    assert culprit.name == "packing" and culprit.note.startswith("packed: first seen at %decaying_sum")
    assert culprit.note.endswith("as the model wrote it")


def test_a_cache_that_forgets_shows_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step starts the recurrence anew: right for whole sequences, wrong as soon as one is split."""
    twin = OPS["cached_decaying_sum"]

    def forgetful(*arguments: Any) -> Tensor:
        return twin.reference(*arguments[:-1], torch.zeros_like(arguments[-1]))

    monkeypatch.setitem(twin.kernels, "cpu", Kernel("cpu", forgetful, lambda **_: None))
    culprit = _culprit(check(_hybrid()))
    assert culprit.name == "select_kernels" and culprit.note.startswith("in chunks")
    assert "cached_decaying_sum [cpu]" in culprit.note


@pytest.mark.usefixtures("captured_once")
def test_a_broken_kernel_is_named(small: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    op = OPS["rms_norm"]

    def slightly_off(*arguments: Any) -> Tensor:
        return op.reference(*arguments) * 1.01

    monkeypatch.setitem(op.kernels, "cpu", Kernel("cpu", slightly_off, lambda **_: None))
    culprit = _culprit(check(small))
    assert culprit.name == "select_kernels" and "rms_norm [cpu]" in culprit.note


@pytest.mark.usefixtures("captured_once")
def test_a_backend_that_computes_something_else_is_named(small: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    from autodeploy.debug import check as module

    honest = module.compile_graph
    monkeypatch.setattr(module, "compile_graph", lambda *args: lambda *inputs: honest(*args)(*inputs) * 1.01)
    assert _culprit(check(small)).name == "replay"


@pytest.mark.usefixtures("captured_once")
def test_what_raises_is_a_failed_row(small: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def damage(graph: ModelGraph) -> None:
        raise TransformError("expected a graph, found a mess")

    _break(monkeypatch, "fuse_qkv", damage)
    report = check(small)
    assert report.rows[-1].name == "fuse_qkv" and "found a mess" in report.rows[-1].note


def test_a_model_that_cannot_be_captured_is_a_failed_row() -> None:
    report = check(Sketch(lambda self, x: x[:, : int(x.sum())] if bool(x.mean() > 0) else x))
    assert [(row.name, row.verdict) for row in report.rows] == [("capture", FAILED)]
    assert "cannot capture" in report.rows[0].note


def test_a_model_without_mixing_proves_nothing_about_packing() -> None:
    report = check(Sketch(lambda self, x: x.relu()))
    assert report.passed
    assert {row.name: row.verdict for row in report.rows}["packing"] == "inconclusive"


def test_a_transform_that_is_switched_off_is_not_run(small: nn.Module) -> None:
    off = parse_options({"transforms": {"fuse_qkv": {"enabled": False}}})
    assert "fuse_qkv" not in [row.name for row in check(small, off).rows]


@pytest.mark.usefixtures("captured_once")
def test_backends_of_a_device_are_compared_by_what_they_generate(
    small: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on CUDA, with a checker in the place of the device."""
    from autodeploy.debug import check as module

    assert module.compared_backends(torch.device("cuda")) == COMPARED and not module.compared_backends(
        torch.device("cpu")
    )
    capture_with_checker(monkeypatch)
    monkeypatch.setattr(module, "compared_backends", lambda device: ("torch-simple", "torch-cudagraph"))
    simple, graphs = check(small).rows[-2:]
    assert (simple.stage, simple.error, simple.verdict) == ("generate", 0.0, "passed")
    assert (graphs.name, graphs.verdict) == ("torch-cudagraph", "passed")
    assert graphs.note == (
        "18 of 18 tokens are those of the first backend; 1 steps in pieces; 5 steps whole; "
        "15 of 15 tokens chosen in graphs are what their logits give"
    )

    honest = CaptureChecker.record

    def record(self: CaptureChecker, work: Work) -> Work:
        replay = honest(self, work)

        def forgetful() -> None:  # a device that repeats every other time
            nonlocal count
            count += 1
            if count % 2:
                replay()

        count = 0
        return forgetful

    monkeypatch.setattr(CaptureChecker, "record", record)
    assert _culprit(check(small)).name == "torch-cudagraph"


@pytest.mark.usefixtures("captured_once")
def test_a_token_that_a_graph_chooses_wrongly_fails(small: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = GraphedChoice.choose

    def one_late(self: GraphedChoice, logits: Tensor, inputs: Mapping[str, Tensor]) -> None:
        honest(self, logits, {**inputs, "position_ids": inputs["position_ids"] + 1})

    capture_with_checker(monkeypatch)
    monkeypatch.setattr("autodeploy.debug.check.compared_backends", lambda device: ("torch-simple", "torch-cudagraph"))
    monkeypatch.setattr(GraphedChoice, "choose", one_late)
    culprit = _culprit(check(small))
    assert culprit.name == "torch-cudagraph" and culprit.error is not None and culprit.tolerance is not None
    assert culprit.error <= culprit.tolerance and "15 of 15 tokens chosen" not in culprit.note
