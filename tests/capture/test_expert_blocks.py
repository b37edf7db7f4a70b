"""Loops over experts, as people write them in their own modules: one node each, confirmed by numbers or left alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import LongcatFlashConfig
from transformers.models.dbrx.configuration_dbrx import DbrxFFNConfig
from transformers.models.dbrx.modeling_dbrx import DbrxExperts
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashExperts

from autodeploy.build import build
from autodeploy.capture.expert_blocks import expert_blocks_replaced, recognise
from autodeploy.capture.expert_weights import expert_weights
from autodeploy.capture.random_weights import with_random_weights
from autodeploy.capture.tape import Recording, TooLarge
from autodeploy.debug.packed_run import run_packed
from autodeploy.errors import CaptureError
from tests.graphs import Sketch, captured, counts, run

HIDDEN, WIDTH = 16, 24


class Gated(nn.Module):
    def __init__(self, bias: bool = False, activation: Callable[[Tensor], Tensor] = F.silu):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(HIDDEN, WIDTH, bias), nn.Linear(HIDDEN, WIDTH, bias)
        self.down_proj = nn.Linear(WIDTH, HIDDEN, bias)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.activation(self.gate_proj(x)) * self.up_proj(x))


class Plain(nn.Module):
    """No gate; the products are called in an order that names do not tell."""

    def __init__(self) -> None:
        super().__init__()
        self.b, self.a = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(F.gelu(self.a(x), approximate="tanh"))


class Interleaved(nn.Module):
    """Gate and up in one product, row by row in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.down = nn.Linear(HIDDEN, 2 * WIDTH), nn.Linear(WIDTH, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        both = self.both(x)
        return self.down(F.relu(both[..., ::2]) * both[..., 1::2])


class Uneven(Gated):
    """A bias on the gate alone: a mixture, but none that one op has facts for."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(HIDDEN, WIDTH)


class _Block(nn.Module):
    def __init__(self, num_experts: int = 6, expert: Callable[[], nn.Module] = Gated, top_k: int = 2):
        super().__init__()
        self.gate, self.top_k, self.num_experts = nn.Linear(HIDDEN, num_experts, bias=False), top_k, num_experts
        self.experts = nn.ModuleList(expert() for _ in range(num_experts))


class LoopOverAll(_Block):
    """Every expert in turn, those without tokens too; gives its router's logits as well."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        batch, tokens, hidden = hidden_states.shape
        flat = hidden_states.view(-1, hidden)
        logits = self.gate(flat)
        weights, chosen = torch.topk(F.softmax(logits, dim=1, dtype=torch.float), self.top_k, dim=-1)
        weights /= weights.sum(dim=-1, keepdim=True)
        weights = weights.to(flat.dtype)
        total = torch.zeros((batch * tokens, hidden), dtype=flat.dtype, device=flat.device)
        mask = F.one_hot(chosen, num_classes=self.num_experts).permute(2, 1, 0)
        for number in range(self.num_experts):
            place, token = torch.where(mask[number])
            current = self.experts[number](flat[None, token].reshape(-1, hidden)) * weights[token, place, None]
            total.index_add_(0, token, current.to(flat.dtype))
        return total.reshape(batch, tokens, hidden), logits


class SortedBySize(_Block):
    """Tokens sorted by expert and cut by counts taken out of torch; a shared expert and sigmoid scores."""

    def __init__(self, **fields: Any):
        super().__init__(**fields)
        self.shared, self.bias = Gated(), nn.Parameter(torch.randn(self.num_experts))

    def forward(self, x: Tensor) -> Tensor:
        identity, shape = x, x.shape
        x = x.view(-1, shape[-1])
        scores = self.gate(x.float().to(x.dtype)).sigmoid()
        chosen = torch.topk(scores + self.bias, k=self.top_k, dim=-1, sorted=False)[1]
        weight = scores.gather(1, chosen) * 2.5
        counts = chosen.new_zeros((chosen.shape[0], len(self.experts))).scatter_(1, chosen, 1).sum(dim=0)
        order = chosen.view(-1).argsort()
        rows, start, outputs = x[order // chosen.shape[1]], 0, []
        for number, count in enumerate(counts.cpu().numpy()):
            if count:
                outputs.append(self.experts[number](rows[start : start + count]))
                start += count
        result = torch.cat(outputs)
        back = torch.empty_like(result)
        back[order] = result
        total = back.view(*chosen.shape, -1).type(weight.dtype).mul_(weight.unsqueeze(-1)).sum(dim=1).type(x.dtype)
        return total.view(*shape) + self.shared(identity)


class LoopOverHit(_Block):
    """Only experts that have tokens, found by `nonzero`; weights of all experts, not of the choices."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        scores = self.gate(flat).softmax(-1)
        chosen = scores.topk(self.top_k).indices
        kept = torch.zeros_like(scores).scatter(1, chosen, 1.0) * scores
        out = torch.zeros_like(flat)
        for number in kept.sum(0).nonzero().flatten().tolist():
            tokens = kept[:, number].nonzero().flatten()
            out[tokens] += kept[tokens, number, None] * self.experts[number](flat[tokens])
        return out.view_as(x)


def _drawn(module: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.4
    return module.eval()


def _model(block: nn.Module) -> nn.Module:
    def body(self: nn.Module, x: Tensor) -> Tensor:
        result = self.block(x)
        return x + (result[0] if isinstance(result, tuple) else result)

    return _drawn(Sketch(body, block=block))


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "all": LoopOverAll,
    "all, one choice": lambda: LoopOverAll(top_k=1),
    "sorted": SortedBySize,
    "hit": LoopOverHit,
    "biases": lambda: LoopOverAll(expert=lambda: Gated(bias=True)),
    "plain": lambda: LoopOverHit(expert=Plain),
    "interleaved": lambda: LoopOverAll(expert=Interleaved),
    "gelu": lambda: SortedBySize(expert=lambda: Gated(activation=F.gelu)),
}


@pytest.mark.parametrize("name", BLOCKS)
def test_a_loop_becomes_one_node_with_the_same_numbers(name: str) -> None:
    model = _model(BLOCKS[name]())
    names = {name for name, _ in model.named_parameters()}
    graph = captured(model)
    assert counts(graph)["moe"] == 1
    assert {name for name, _ in model.named_parameters()} == names, "the model is left as it was"
    ids = torch.randint(0, 32, (1, 11), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(run(graph, model, [11], seed=3), model(ids), rtol=1e-4, atol=1e-4)


def test_it_runs_packed_as_it_does_alone_and_in_bfloat16() -> None:
    model = _model(SortedBySize())
    rows = [torch.arange(length) for length in (7, 1, 12)]
    with torch.no_grad():
        exact = torch.cat([model(row[None])[0] for row in rows])
        torch.testing.assert_close(run_packed(build(model), rows), exact, rtol=1e-4, atol=1e-4)
        half = model.to(torch.bfloat16)
        rounded = torch.cat([half(row[None])[0] for row in rows]).float()
        mine = run_packed(build(half), rows)
    assert (mine - exact).abs().mean() < 1.2 * (rounded - exact).abs().mean()


def test_capture_does_not_grow_with_the_number_of_experts() -> None:
    few, many = (captured(_model(LoopOverAll(num_experts=number))) for number in (8, 128))
    assert len(few.graph.nodes) == len(many.graph.nodes)
    (gate_up,) = [recipe for recipe in many.weights.values() if recipe.shape == (128, 2 * WIDTH, HIDDEN)]
    assert len(gate_up.sources()) == 256 and gate_up.sources()[:2] == (
        "block.experts.0.gate_proj.weight",
        "block.experts.0.up_proj.weight",
    )


class _Different(_Block):
    """The loop adds something of its own to each expert's result."""

    def forward(self, x: Tensor) -> Tensor:
        flat = x.view(-1, x.shape[-1])
        weights, chosen = self.gate(flat).softmax(-1).topk(self.top_k)
        out = torch.zeros_like(flat)
        for number in chosen.unique().tolist():
            token, place = torch.where(chosen == number)
            out.index_add_(0, token, self.experts[number](flat[token]) * weights[token, place, None] + number / 9)
        return out.view_as(x)


class _Mixing(LoopOverAll):
    """Each token's experts see the token before it too."""

    def forward(self, hidden_states: Tensor) -> Any:
        return super().forward(hidden_states + hidden_states.roll(1, 1))[0]


@pytest.mark.parametrize("block", [_Different, _Mixing])
def test_near_misses_are_no_mixture(block: type[nn.Module]) -> None:
    module = _drawn(block())
    readings = list(expert_weights(module))
    assert len(readings) == 1 and recognise(module, readings) is None


def test_what_is_not_recognised_is_refused_by_module() -> None:
    with pytest.raises(CaptureError, match=r"module.*block"):
        captured(_model(_Different()))


@pytest.mark.parametrize(
    "module",
    [
        LoopOverHit(expert=Uneven),
        nn.Linear(4, 4),
        nn.ModuleList([Gated(), Gated()]),
        nn.Sequential(Gated(), Gated()),
        Gated(),
    ],
)
def test_other_modules_are_not_even_tried(module: nn.Module) -> None:
    assert list(expert_weights(module)) == []


def _three_arguments(kind: str) -> tuple[nn.Module, int]:
    """A module that takes tokens, choices and weights, and how many choices there are."""
    if kind == "flat stacks":
        ffn = {"hidden_size": 16, "ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2}
        return DbrxExperts(DbrxFFNConfig(**ffn)), 4
    config = LongcatFlashConfig(hidden_size=16, expert_ffn_hidden_size=24, n_routed_experts=4, zero_expert_num=3)
    return LongcatFlashExperts(config), 7


@pytest.mark.parametrize("kind", ["flat stacks", "experts that pass on"])
def test_stacks_that_are_given_their_choices(kind: str) -> None:
    experts, num_choices = _three_arguments(kind)

    def body(self: nn.Module, x: Tensor) -> Tensor:
        weights, chosen = self.router(x[0]).softmax(-1).topk(3)
        return self.experts(x if kind == "flat stacks" else x[0], chosen, weights).view(x.shape)

    model = _drawn(Sketch(body, router=nn.Linear(16, num_choices), experts=experts))
    graph = captured(model)
    assert counts(graph)["moe"] == 1
    ids = torch.randint(0, 32, (1, 11), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        torch.testing.assert_close(run(graph, model, [11], seed=3), model(ids), rtol=1e-4, atol=1e-4)


def test_recognition_needs_no_storage_and_little_memory() -> None:
    with torch.device("meta"):
        block = LoopOverAll(num_experts=8)
        for expert in block.experts:
            expert.gate_proj, expert.up_proj = nn.Linear(HIDDEN, 1 << 15), nn.Linear(HIDDEN, 1 << 15)
            expert.down_proj = nn.Linear(1 << 15, HIDDEN)
    probe = with_random_weights(block)
    assert sum(p.untyped_storage().nbytes() for p in probe.parameters()) < sum(p.nbytes for p in probe.parameters()) / 4
    found = recognise(block, list(expert_weights(block)))
    assert found is not None and found.experts.num_experts == 8


def test_one_recognition_serves_all_layers_of_a_kind() -> None:
    model = nn.Sequential(*(LoopOverHit() for _ in range(3)))
    with expert_blocks_replaced(model) as recipes:
        assert all("forward" in vars(block) and not len(block.experts) for block in model)
        assert len(recipes) == 6 and recipes["2.experts_down"].sources()[5] == "2.experts.5.down_proj.weight"
    assert not any("forward" in vars(block) for block in model) and len(model[0].experts) == 6


class AllAtOnce(nn.Module):
    """Every expert runs on every token, by one product of all weights."""

    def __init__(self, experts: int, hidden: int, width: int) -> None:
        super().__init__()
        self.router = nn.Linear(hidden, experts, bias=False)
        self.up = nn.Parameter(torch.empty(experts, hidden, width))
        self.down = nn.Parameter(torch.empty(experts, width, hidden))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.router(x).sigmoid()
        products = torch.bmm(F.silu(torch.bmm(x.expand(len(self.up), -1, -1), self.up)), self.down)
        return (products * scores.t()[..., None]).sum(0)


def test_a_product_of_gigabytes_is_not_tried() -> None:
    with torch.device("meta"):
        module = AllAtOnce(16, 4096, 4104)
    with pytest.raises(TooLarge, match="268,959,744 elements"):
        Recording(3).record(with_random_weights(module), [torch.ones(3, 4096)])
    assert recognise(module, list(expert_weights(module))) is None
