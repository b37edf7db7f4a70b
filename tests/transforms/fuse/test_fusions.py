"""Fusions: each fires where it should with the same numbers, and leaves its near misses alone with a reason."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autodeploy.checkpoint.recipe import Concat
from autodeploy.graph.model_graph import ModelGraph
from autodeploy.ops import gated_rms_norm, linear
from autodeploy.transforms.canonicalize.drop_no_ops import DropNoOps
from autodeploy.transforms.canonicalize.match_attention import MatchAttention
from autodeploy.transforms.canonicalize.match_linear import MatchLinear
from autodeploy.transforms.canonicalize.match_norm import MatchNorm
from autodeploy.transforms.fuse.fuse_add_rms_norm import FuseAddRMSNorm
from autodeploy.transforms.fuse.fuse_gate_up import FuseGateUp
from autodeploy.transforms.fuse.fuse_gated_norm_casts import FuseGatedNormCasts
from autodeploy.transforms.fuse.fuse_qkv import FuseQKV
from tests.graphs import Attention, Sketch, attention_model, captured, causal_sdpa, counts, run


def _canonical(model: nn.Module) -> ModelGraph:
    graph = captured(model)
    for transform in (MatchAttention(), MatchLinear(), MatchNorm(), DropNoOps()):
        transform.run(graph)
    return graph


def test_qkv_becomes_one_product() -> None:
    model = attention_model(causal_sdpa, kv_heads=4)
    graph = _canonical(model)
    before = run(graph, model)
    report = FuseQKV().run(graph)
    assert (report.expected, report.found, report.rewritten) == (1, 1, 1)
    assert len(graph.nodes(linear)) == 3  # qkv, o, head
    fused = [recipe for recipe in graph.weights.values() if isinstance(recipe, Concat)]
    assert [recipe.sources() for recipe in fused] == [("layer.q.weight", "layer.k.weight", "layer.v.weight")]
    torch.testing.assert_close(run(graph, model), before, rtol=1e-5, atol=1e-6)


def test_qkv_with_biases() -> None:
    model = attention_model(causal_sdpa)
    for name in "qkv":
        setattr(model.layer, name, nn.Linear(16, 16))
    graph = _canonical(model)
    before = run(graph, model)
    assert FuseQKV().run(graph).rewritten == 1
    torch.testing.assert_close(run(graph, model), before, rtol=1e-5, atol=1e-6)


def test_qkv_near_miss_only_some_have_a_bias() -> None:
    model = attention_model(causal_sdpa)
    model.layer.q = nn.Linear(16, 16)
    report = FuseQKV().run(_canonical(model))
    assert report.rewritten == 0 and "some have a bias" in report.refused[0]


def test_qkv_near_miss_a_weight_used_twice() -> None:
    model = attention_model(causal_sdpa)
    model.layer.k = model.layer.v
    report = FuseQKV().run(_canonical(model))
    assert report.rewritten == 0 and "shared" in report.refused[0]


def test_qkv_leaves_linears_that_feed_no_mixer() -> None:
    model = Sketch(lambda self, x: self.a(x).relu() + self.b(x), a=nn.Linear(16, 16), b=nn.Linear(16, 16))
    assert FuseQKV().run(_canonical(model)).found == 0


def _mlp(activation: object, *, swapped: bool = False) -> nn.Module:
    def body(self: nn.Module, x: Tensor) -> Tensor:
        gate, up = activation(self.gate(x)), self.up(x)  # type: ignore[operator]
        return x + self.down(up * gate if swapped else gate * up)

    bodies = {"gate": nn.Linear(16, 24, bias=False), "up": nn.Linear(16, 24, bias=False)}
    return Sketch(body, **bodies, down=nn.Linear(24, 16, bias=False))


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("activation", [F.silu, F.gelu, lambda x: F.gelu(x, approximate="tanh"), F.relu, torch.sigmoid])
def test_gate_up_becomes_one_product(activation: object, swapped: bool) -> None:
    model = _mlp(activation, swapped=swapped)
    graph = _canonical(model)
    before = run(graph, model)
    report = FuseGateUp().run(graph)
    assert (report.expected, report.rewritten) == (1, 1)
    assert counts(graph) == {"linear": 3, "gated_activation": 1}
    torch.testing.assert_close(run(graph, model), before, rtol=1e-5, atol=1e-6)


def test_gate_up_with_the_up_projection_first() -> None:
    def body(self: nn.Module, x: Tensor) -> Tensor:
        up = self.up(x)
        return x + self.down(up * F.silu(self.gate(x)))

    model = _mlp(F.silu)
    model.body = body
    graph = _canonical(model)
    before = run(graph, model)
    assert FuseGateUp().run(graph).rewritten == 1
    torch.testing.assert_close(run(graph, model), before, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("apart", [lambda x: x.chunk(2, dim=-1), lambda x: x.split(24, dim=2)])
def test_gate_up_of_a_weight_stored_as_one(apart: Callable[[Tensor], tuple[Tensor, Tensor]]) -> None:
    def body(self: nn.Module, x: Tensor) -> Tensor:
        gate, up = apart(self.gate_up(x))
        return self.down(up * F.silu(gate))

    model = Sketch(body, gate_up=nn.Linear(16, 48, bias=False), down=nn.Linear(24, 16, bias=False))
    graph = _canonical(model)
    before = run(graph, model)
    assert FuseGateUp().run(graph).rewritten == 1
    torch.testing.assert_close(run(graph, model), before, rtol=1e-5, atol=1e-6)


def test_gate_up_near_misses() -> None:
    def other_input(self: nn.Module, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x + 1))

    def unknown_activation(self: nn.Module, x: Tensor) -> Tensor:
        return self.down(F.elu(self.gate(x)) * self.up(x))

    for body in (other_input, unknown_activation):
        modules = {name: nn.Linear(16, 24) for name in ("gate", "up")}
        assert FuseGateUp().run(_canonical(Sketch(body, **modules, down=nn.Linear(24, 16)))).found == 0


class _Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.RMSNorm(16, eps=1e-5), Attention(causal_sdpa)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(self.norm(x))


def test_residual_sum_and_norm_become_one_op() -> None:
    layers = nn.Sequential(_Residual(), _Residual())
    model = Sketch(lambda self, x: self.last(self.layers(x)), layers=layers, last=nn.RMSNorm(16, eps=1e-5))
    graph = _canonical(model)
    before = run(graph, model)
    report = FuseAddRMSNorm().run(graph)
    assert (report.expected, report.rewritten) == (2, 2)
    assert counts(graph)["add_rms_norm"] == 2 and counts(graph)["rms_norm"] == 1
    torch.testing.assert_close(run(graph, model), before, rtol=1e-5, atol=1e-6)


def test_add_norm_near_miss_broadcast_sum() -> None:
    def body(self: nn.Module, x: Tensor) -> Tensor:
        return self.norm(x + self.bias)

    model = Sketch(body, norm=nn.RMSNorm(16), bias=nn.Parameter(torch.randn(16)))
    assert FuseAddRMSNorm().run(_canonical(model)).found == 0


def _gated_norm(read: Callable[[Tensor], Tensor], write: Callable[[Tensor], Tensor], gate_first: bool) -> nn.Module:
    """A gated norm of what `read` makes of the hidden states, in bfloat16 but for that."""

    def body(self: nn.Module, x: Tensor) -> Tensor:
        normed = gated_rms_norm(read(x), x.flip(-1), self.scale, 1e-6, "silu", 2, gate_first, False)
        return write(normed).to(x.dtype)

    return Sketch(body, scale=nn.Parameter(torch.randn(16))).bfloat16()


@pytest.mark.parametrize("gate_first", [True, False])
@pytest.mark.parametrize(
    "read", [lambda x: x.float(), lambda x: x.view(*x.shape[:2], 4, 4).float().reshape(*x.shape[:2], -1)]
)
def test_casts_around_a_gated_norm_go_with_the_same_bits(read: Callable[[Tensor], Tensor], gate_first: bool) -> None:
    model = _gated_norm(read, lambda x: x, gate_first)
    graph = _canonical(model)
    before = run(graph, model)
    report = FuseGatedNormCasts().run(graph)
    assert (report.found, report.rewritten) == (1, 1)
    assert not [node for node in graph.graph.nodes if node.target == torch.ops.aten.to.dtype]
    (norm,) = graph.nodes(gated_rms_norm)
    assert norm.meta["val"].dtype == torch.bfloat16
    assert torch.equal(run(graph, model), before)


@pytest.mark.parametrize(
    ("read", "write", "reason"),
    [
        (lambda x: x.float() + 1, lambda x: x, "made wider"),
        (lambda x: x.half().float(), lambda x: x, "made wider"),
        (lambda x: x.float(), lambda x: x + 1, "unrounded"),
        (lambda x: x.float(), lambda x: x.half(), "unrounded"),
    ],
)
def test_gated_norm_near_misses(
    read: Callable[[Tensor], Tensor], write: Callable[[Tensor], Tensor], reason: str
) -> None:
    report = FuseGatedNormCasts().run(_canonical(_gated_norm(read, write, True)))
    assert (report.found, report.rewritten) == (1, 0) and reason in report.refused[0]


def test_a_gated_norm_of_one_dtype_has_no_casts() -> None:
    assert FuseGatedNormCasts().run(_canonical(_gated_norm(lambda x: x + 1, lambda x: x, True))).found == 0
