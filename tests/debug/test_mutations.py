"""Whatever transform is broken on purpose, `check` names it: each on a model in which that transform has work to do."""

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from transformers import DeepseekV3Config, LlamaConfig

from autodeploy.capture.export import capture
from autodeploy.config import parse_options
from autodeploy.debug.check import check
from autodeploy.debug.check_report import CheckReport
from autodeploy.debug.shrink import tiny_model
from autodeploy.graph.model_graph import ModelGraph
from autodeploy.graph.transform import TransformResult
from autodeploy.transforms.pipeline import default_pipeline
from tests.graphs import Sketch

aten = torch.ops.aten
TRANSFORMS = default_pipeline(torch.device("cpu")).transforms()

_SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
}  # fmt: skip


def _dense() -> nn.Module:
    """Attention, norms, rotary positions, a gated feed-forward block."""
    return tiny_model(LlamaConfig(**_SIZES, num_key_value_heads=2))


def _latent() -> nn.Module:
    """Multi-head latent attention."""
    ranks = {"q_lora_rank": 16, "kv_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12}
    return tiny_model(DeepseekV3Config(**_SIZES, **ranks, num_key_value_heads=4, first_k_dense_replace=1))


def _mixture() -> nn.Module:
    """What authors write out: a loop over tokens, a shift, a window, a convolution, dense experts, positions."""

    def experts(self: Sketch, x: Tensor) -> Tensor:
        flat = x.reshape(-1, 16)
        logits = self.router(flat)
        values, chosen = torch.topk(logits, 2, dim=1)
        scores = torch.full_like(logits, float("-inf")).scatter_(1, chosen, values).sigmoid()
        rows = (flat.repeat(3, 1) * scores.transpose(0, 1).reshape(-1, 1)).view(3, -1, 16)
        gate, up = torch.bmm(rows, self.gate_up).chunk(2, dim=-1)
        return torch.bmm(up * F.silu(gate), self.down).view(3, -1, 16).sum(dim=0).view(x.shape)

    def loop(self: Sketch, x: Tensor) -> Tensor:
        state, rows = torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            state = self.decay * state + x[:, t]
            rows.append(state)
        return torch.stack(rows, dim=1)

    def body(self: Sketch, x: Tensor) -> Tensor:
        x = x + self.positions(torch.arange(x.shape[1], device=x.device))
        x = x + F.pad(x, (0, 0, 1, -1))
        x = x + (F.pad(x, (0, 0, 2, 0)).unfold(1, 3, 1) * self.taps).sum(-1)
        x = x + self.convolution(F.pad(x.transpose(1, 2), (3, 0))).transpose(1, 2)
        return experts(self, self.norm(x + loop(self, x)))

    torch.manual_seed(0)
    stacks = {"gate_up": nn.Parameter(torch.randn(3, 16, 24)), "down": nn.Parameter(torch.randn(3, 12, 16))}
    parts = {"positions": nn.Embedding(64, 16), "norm": nn.LayerNorm(16), "router": nn.Linear(16, 3)}
    kernel = nn.Conv1d(16, 16, 4, groups=16)
    return Sketch(body, convolution=kernel, decay=nn.Parameter(torch.rand(16)), taps=torch.randn(3), **parts, **stacks)


MODELS: dict[str, Callable[[], nn.Module]] = (
    {name: _dense for name in TRANSFORMS}
    | dict.fromkeys(
        ("roll_loops", "match_recurrences", "match_token_shift", "match_token_window", "match_causal_conv"), _mixture
    )
    | dict.fromkeys(
        ("bind_boundaries", "use_position_ids", "match_dense_experts", "fold_weights", "match_norm"), _mixture
    )
    | {"match_mla": _latent}
)
"""transform -> a model that it has work to do in"""
WITHOUT_WORK_HERE = {"assign_streams", "fuse_gated_norm_casts", "fuse_rope_attention", "place_on_device"}
"""what a graph on the CPU, or in float32, leaves nothing to do for"""
WITHOUT_A_RUN_BEFORE = {"roll_loops"}
"""what makes a graph run at all: it is compared with the model's own code, and no node can be blamed"""


@functools.cache
def _captured(make: Callable[[], nn.Module]) -> tuple[nn.Module, ModelGraph]:
    model = make()
    return model, capture(model)


def _checked(names: list[str], monkeypatch: pytest.MonkeyPatch) -> CheckReport:
    """Check the model of these transforms, captured once; those that are off by default are switched on."""
    model, graph = _captured(MODELS[names[0]])

    def copied(_: nn.Module) -> ModelGraph:
        module, weights, states = copy.deepcopy(graph.module), dict(graph.weights), list(graph.states)
        return dataclasses.replace(graph, module=module, weights=weights, states=states)

    monkeypatch.setattr("autodeploy.debug.check.capture", copied)
    switched_on = {name: {"enabled": True} for name in names if not TRANSFORMS[name].enabled}
    return check(model, parse_options({"transforms": switched_on}))


def _is_value(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return node.op == "call_function" and isinstance(value, Tensor) and value.is_floating_point()


def _triple_what_it_made(graph: ModelGraph, before: set[str]) -> None:
    """The last value that a transform put into the graph, or one in the middle, becomes three times as large."""
    values = [node for node in graph.graph.nodes if _is_value(node) and node.users]
    made = [node for node in values if node.name not in before]
    node = made[-1] if made else values[len(values) // 2]
    users = list(node.users)
    tripled = graph.call(aten.mul.Tensor, node, 3.0, before=node.next, like=node)
    for user in users:
        user.replace_input_with(node, tripled)


@pytest.mark.parametrize("make", list(dict.fromkeys(MODELS.values())), ids=lambda make: make.__name__)
def test_honest_transforms_have_work_to_do_and_pass(
    make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [name for name, of in MODELS.items() if of is make and name not in WITHOUT_WORK_HERE]
    report = _checked(names, monkeypatch)
    assert report.passed, report.culprit
    rewritten = {row.name: row.transform.rewritten for row in report.rows if row.transform is not None}
    assert not [name for name in names if not rewritten[name]]


@pytest.mark.parametrize("name", TRANSFORMS)
def test_any_broken_transform_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = type(TRANSFORMS[name])
    honest = kind.apply

    def apply(self: Any, graph: ModelGraph) -> TransformResult:
        before = {node.name for node in graph.graph.nodes}
        result = honest(self, graph)
        _triple_what_it_made(graph, before)
        return result

    monkeypatch.setattr(kind, "apply", apply)
    report = _checked([name], monkeypatch)
    assert report.culprit is not None and report.culprit.name == name
    assert name in WITHOUT_A_RUN_BEFORE or f"last changed by {name}" in report.culprit.note
