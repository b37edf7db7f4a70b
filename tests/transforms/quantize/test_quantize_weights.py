"""QuantizeWeights: which products it takes and which it leaves, the recipes it writes, and a whole model's numbers."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autodeploy.build import build
from autodeploy.checkpoint.quantize import Float4Format, Float8Format, NumberFormat, WeightFormat
from autodeploy.checkpoint.recipe import Concat, Quantize
from autodeploy.config import CompileOptions, parse_options
from autodeploy.debug.packed_run import run_packed
from autodeploy.errors import ConfigError
from autodeploy.graph.model_graph import ModelGraph
from autodeploy.ops import fp8_moe, linear, moe, quantized_linear, quantized_moe
from autodeploy.ops.fp8_linear import dequantize as dequantize_float8
from autodeploy.ops.fp8_linear import round_activations as round_to_float8
from autodeploy.ops.quantized_linear import dequantize, round_activations
from autodeploy.transforms.canonicalize.match_linear import MatchLinear
from autodeploy.transforms.pipeline import configure, default_pipeline
from autodeploy.transforms.quantize.quantize_weights import QuantizeWeights
from tests import tiny
from tests.graphs import Sketch, captured, counts, run

INT4 = NumberFormat(4, 32, has_offsets=True)
INT8 = NumberFormat(8, None)


def _linears(model: nn.Module) -> ModelGraph:
    graph = captured(model)
    MatchLinear().run(graph)
    return graph


def _mlp(hidden: int = 64, **modules: nn.Module) -> nn.Module:
    layers = {"up": nn.Linear(hidden, 96), "down": nn.Linear(96, hidden, bias=False)}
    return Sketch(lambda self, x: x + self.down(self.up(x).relu()), hidden=hidden, **layers | modules)


def _formats(graph: ModelGraph) -> dict[str, WeightFormat]:
    recipes = [recipe for recipe in graph.weights.values() if isinstance(recipe, Quantize) and recipe.part == "numbers"]
    return {recipe.sources()[0].removesuffix(".weight"): recipe.number_format for recipe in recipes}


def test_eight_bits_take_every_product() -> None:
    model = _mlp()
    graph = _linears(model)
    before = run(graph, model)
    report = QuantizeWeights(enabled=True, format="int8").run(graph)
    assert (report.expected, report.found, report.rewritten, report.refused) == (3, 3, 3, ())
    assert counts(graph) == {"quantized_linear": 3}
    assert _formats(graph) == {"up": INT8, "down": INT8, "head": INT8}
    assert {name for name in graph.weights if "embed" in name} and len(graph.weights) == 8  # 6 parts, bias, table
    after = run(graph, model)
    assert (after - before).norm() < 0.02 * before.norm() and not torch.equal(after, before)


def test_four_bits_leave_the_head_eight() -> None:
    model = _mlp()
    graph = _linears(model)
    before = run(graph, model)
    assert QuantizeWeights(enabled=True, format="int4").run(graph).rewritten == 3
    assert _formats(graph) == {"up": INT4, "down": INT4, "head": INT8}
    after = run(graph, model)
    assert 0.005 * before.norm() < (after - before).norm() < 0.15 * before.norm()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"format": "int8", "group_size": 32}, NumberFormat(8, 32)),
        ({"format": "int4", "group_size": 96}, NumberFormat(4, 96, has_offsets=True)),
        ({"format": "int4", "has_offsets": False}, NumberFormat(4, 32)),
    ],
    ids=str,
)
def test_groups_and_offsets_are_options(options: dict[str, Any], expected: NumberFormat) -> None:
    graph = _linears(_mlp(hidden=96))
    QuantizeWeights(enabled=True, **options).run(graph)
    assert _formats(graph)["up"] == _formats(graph)["down"] == expected


@pytest.mark.parametrize(("name", "block_size"), [("fp8", None), ("fp8_per_block", 128)])
def test_floating_point_takes_every_product_of_any_size(name: str, block_size: int | None) -> None:
    model = _mlp(hidden=48)
    graph = _linears(model)
    before = run(graph, model)
    report = QuantizeWeights(enabled=True, format=name).run(graph)
    assert (report.expected, report.found, report.rewritten, report.refused) == (3, 3, 3, ())
    assert counts(graph) == {"fp8_linear": 3}
    assert _formats(graph) == dict.fromkeys(("up", "down", "head"), Float8Format(block_size))
    after = run(graph, model)
    assert 0.01 * before.norm() < (after - before).norm() < 0.08 * before.norm()


def test_four_bits_of_floating_point_leave_the_head_eight() -> None:
    model = _mlp(hidden=48)
    graph = _linears(model)
    before = run(graph, model)
    assert QuantizeWeights(enabled=True, format="nvfp4").run(graph).rewritten == 3
    assert counts(graph) == {"nvfp4_linear": 2, "fp8_linear": 1}
    assert _formats(graph) == {"up": Float4Format(), "down": Float4Format(), "head": Float8Format()}
    after = run(graph, model)
    assert 0.01 * before.norm() < (after - before).norm() < 0.2 * before.norm()
    odd = _linears(_mlp(hidden=40))
    report = QuantizeWeights(enabled=True, format="nvfp4").run(odd)
    assert report.rewritten == 2 and "40 inputs are no multiple of 16, the group size" in report.refused[0]


def test_sizes_that_are_no_whole_groups_are_left_with_the_reason() -> None:
    graph = _linears(_mlp(hidden=48))
    report = QuantizeWeights(enabled=True, format="int4").run(graph)
    assert (report.found, report.rewritten, len(report.refused)) == (3, 2, 1)
    assert "48 inputs are no multiple of 32, the group size" in report.refused[0]
    assert counts(graph) == {"linear": 1, "quantized_linear": 2}
    graph = _linears(_mlp(hidden=48))
    assert QuantizeWeights(enabled=True, format="int8").run(graph).rewritten == 3  # whole rows may have any size


def test_a_weight_that_something_else_reads_is_left_and_a_table_is_not() -> None:
    model = _mlp()
    model.body = lambda self, x: x + self.down(self.up(x).relu()) + self.down.weight.sum(1)
    model.head.weight = model.embed.weight
    graph = _linears(model)
    report = QuantizeWeights(enabled=True, format="int8").run(graph)
    assert report.rewritten == 2 and "its weight is also read by sum" in report.refused[0]
    head = next(recipe for recipe in graph.weights.values() if isinstance(recipe, Quantize) and recipe.shape[0] == 2)
    assert head.sources()[0] in ("embed.weight", "head.weight")


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_a_head_that_is_the_embedding_too_is_kept_once(name: str) -> None:
    model = _mlp()
    model.head.weight = model.embed.weight
    graph = _linears(model)
    before = run(graph, model)
    assert QuantizeWeights(enabled=True, format=name).run(graph).rewritten == 3
    assert counts(graph) == {"quantized_embedding": 1, "quantized_linear": 3}
    assert len([weight for weight in graph.weights if "embed" in weight or "head" in weight]) == 2  # numbers, scales
    after = run(graph, model)
    assert (after - before).norm() < 0.15 * before.norm() and not torch.equal(after, before)


def test_a_computed_weight_is_left_with_the_reason() -> None:
    model = _mlp()
    model.body = lambda self, x: nn.functional.linear(x, self.up.weight.tanh())[..., :64]
    graph = _linears(model)
    report = QuantizeWeights(enabled=True, format="int8").run(graph)
    assert report.rewritten == 1 and "computed, not read" in report.refused[0]


def test_routers_keep_their_precision() -> None:
    def body(self: nn.Module, x: Tensor) -> Tensor:
        chosen = self.router(x).softmax(-1).topk(2)
        return x + self.down(self.up(x) * chosen.values.sum(-1, keepdim=True))

    graph = _linears(Sketch(body, 64, up=nn.Linear(64, 96), down=nn.Linear(96, 64), router=nn.Linear(64, 4)))
    report = QuantizeWeights(enabled=True, format="int8").run(graph)
    assert (report.found, report.rewritten) == (3, 3)
    (router,) = graph.nodes(linear)
    assert router.meta["val"].shape[-1] == 4


def _mixture(hidden: int = 64, width: int = 32) -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    fields = {"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100}
    torch.manual_seed(0)
    config = MixtralConfig(hidden_size=hidden, intermediate_size=width, num_local_experts=4, **fields)
    model = MixtralForCausalLM(config).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    return model.requires_grad_(False)


@pytest.mark.parametrize(("quantization", "worst"), [("int8", 0.03), ("int4", 0.25), ("fp8", 0.25), ("nvfp4", 0.5)])
def test_experts_are_quantised_and_their_router_is_not(quantization: str, worst: float) -> None:
    op = {"fp8": "fp8_moe", "nvfp4": "nvfp4_moe"}.get(quantization, "quantized_moe")
    exact, program = build(_mixture()), build(_mixture(), parse_options({"quantization": quantization}))
    report = next(report for report in program.report.transforms if report.name == "quantize_weights")
    assert (report.expected, report.rewritten, report.refused) == (4, 4, ())  # qkv, o, experts, head
    assert program.report.kernels["linear"] and program.report.kernels[op]
    assert (exact.flops_per_token, exact.flops_per_logits_row) == (
        program.flops_per_token,
        program.flops_per_logits_row,
    )
    parts = 4 * 3 * 64 * 32  # weights of experts, of which a token chooses half
    least = {"int8": parts // 2, "int4": parts // 4, "fp8": parts // 2, "nvfp4": parts // 4}[quantization]
    unread = program.weight_bytes - program.step_weight_bytes
    assert least <= unread - 100 * 64 * 4 < 1.3 * least
    rows = [torch.tensor(prompt) % 100 for prompt in tiny.prompts(4, longest=20)]
    before, after = run_packed(exact, rows), run_packed(program, rows)
    # Of two experts with nearly the same score, rounding may choose another one for a token.
    error = (after - before).norm(dim=-1) / before.norm(dim=-1)
    assert 1e-4 < float(error.median()) < worst


def test_experts_that_are_no_whole_tiles_are_left_with_the_reason() -> None:
    graph = _lowered(_mixture(width=40), quantization="int8", transforms={"quantize_weights": {"enabled": False}})
    report = QuantizeWeights(enabled=True, format="int4").run(graph)
    assert "moe in " in report.refused[0] and "40 inputs are no multiple of 32" in report.refused[0]
    report = QuantizeWeights(enabled=True, format="int8").run(graph)
    assert len(report.refused) == 0 and len(graph.nodes(quantized_moe)) == 1
    odd = _lowered(_mixture(hidden=40), quantization="int8")
    assert not odd.nodes(quantized_moe) and len(odd.nodes(moe)) == 1


def test_experts_that_are_no_whole_blocks_are_left_with_the_reason() -> None:
    graph = _lowered(_mixture(hidden=128, width=40), quantization="fp8_per_block")
    assert len(graph.nodes(moe)) == 1 and not graph.nodes(fp8_moe)
    report = QuantizeWeights(enabled=True, format="fp8_per_block").run(graph)
    assert report.rewritten == 0 and "80 outputs of an expert are no multiple of 128" in report.refused[0]
    whole = _lowered(_mixture(hidden=128, width=64), quantization="fp8_per_block")
    assert not whole.nodes(moe) and len(whole.nodes(fp8_moe)) == 1


def _exactly_rounded(model: nn.Module, formats: dict[str, WeightFormat]) -> nn.Module:
    """The model with each product's weight replaced by what its numbers stand for, activations rounded before it."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            number_format = formats["head" if name.endswith("head") else "other"]
            parts = number_format.quantize(module.weight.detach(), None)
            if isinstance(number_format, NumberFormat):
                weight = dequantize(parts["numbers"], parts["scales"], parts.get("offsets"), *module.weight.shape)
                rounding: Callable[[Tensor], Tensor] = round_activations
            else:
                weight = dequantize_float8(parts["numbers"], parts["scales"], None)
                rounding = partial(round_to_float8, block_size=None)
            module.weight = nn.Parameter(weight, requires_grad=False)
            module.register_forward_pre_hook(lambda _, arguments, rounding=rounding: (rounding(arguments[0]),))
    return model


def _llama64() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    fields = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100}
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=96, **fields)).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=0.2)
    return model.requires_grad_(False)


@pytest.mark.parametrize(
    ("quantization", "formats"),
    [
        ("int8", {"head": INT8, "other": INT8}),
        ("int4", {"head": INT8, "other": INT4}),
        ("fp8", {"head": Float8Format(), "other": Float8Format()}),
    ],
)
def test_a_model_computes_what_its_rounded_weights_stand_for(
    quantization: str, formats: dict[str, WeightFormat]
) -> None:
    program = build(_llama64(), parse_options({"quantization": quantization}))
    report = next(report for report in program.report.transforms if report.name == "quantize_weights")
    assert (report.expected, report.rewritten) == (9, 9)  # two layers of qkv, o, gate-up, down; the head
    assert program.report.facts["isolation"] == "passed"
    model = _exactly_rounded(_llama64(), formats)
    rows = [torch.tensor(prompt) % 100 for prompt in tiny.prompts(3, longest=20)]
    with torch.no_grad():
        expected = torch.cat([model(row[None]).logits[0] for row in rows])
    errors = (run_packed(program, rows) - expected).norm(dim=-1) / expected.norm(dim=-1)
    # A value on the border of two levels may go to either, as sums differ in their last bits; few tokens have one.
    # Without rounded activations the error would be 0.03 throughout.
    assert errors.median() < 1e-5 and errors.max() < (5e-2 if quantization == "fp8" else 2e-2)


def test_floating_point_moves_distributions_little() -> None:
    """KL divergence and perplexity of a random model's own greedy tokens, in the order of the bits."""
    rows = [torch.tensor(prompt) % 100 for prompt in tiny.prompts(4, longest=30)]
    exact = run_packed(build(_llama64()), rows).log_softmax(-1)
    divergence, worse = {}, {}
    for quantization in ("int8", "fp8", "fp8_per_block", "nvfp4"):
        rounded = run_packed(build(_llama64(), parse_options({"quantization": quantization})), rows).log_softmax(-1)
        divergence[quantization] = float((exact.exp() * (exact - rounded)).sum(-1).mean())
        chosen = exact.argmax(-1, keepdim=True)
        worse[quantization] = float((exact - rounded).gather(-1, chosen).mean().exp())
    assert 1e-4 < divergence["int8"] < min(divergence["fp8"], divergence["fp8_per_block"])
    assert max(divergence["fp8"], divergence["fp8_per_block"]) < min(0.1, divergence["nvfp4"])
    assert divergence["nvfp4"] < 0.6  # weights drawn wide: attention is sharp, and no grid is found again
    assert all(0.7 < ratio < 1.5 for ratio in worse.values())


def test_fused_products_are_quantised_as_one() -> None:
    program_graph = _lowered(_llama64(), quantization="int4")
    matrices = [recipe.of for recipe in program_graph.weights.values() if isinstance(recipe, Quantize)]
    fused = {len(recipe.parts) for recipe in matrices if isinstance(recipe, Concat)}
    assert fused == {2, 3} and not program_graph.nodes(linear)
    assert len(program_graph.nodes(quantized_linear)) == 9


def _lowered(model: nn.Module, **options: Any) -> ModelGraph:
    graph = captured(model)
    for stage in configure(default_pipeline(torch.device("cpu")), CompileOptions(**options)).stages:
        list(stage.run(graph))
    return graph


def test_nothing_happens_unless_it_is_asked_for() -> None:
    assert not _lowered(_llama64()).nodes(quantized_linear)
    off = _lowered(_llama64(), quantization="int8", transforms={"quantize_weights": {"enabled": False}})
    assert not off.nodes(quantized_linear)


def test_unknown_formats_name_the_known_ones() -> None:
    with pytest.raises(
        ConfigError, match=r"quantization must be one of None, int8, int4, fp8, fp8_per_block, nvfp4; got 'int3'"
    ):
        parse_options({"quantization": "int3"})
    with pytest.raises(ConfigError, match="multiple of 32, got 48"):
        parse_options({"quantization": "int4", "quantization_group_size": 48})
    with pytest.raises(ConfigError, match="with quantization='fp8', which has sizes of its own"):
        parse_options({"quantization": "fp8", "quantization_group_size": 64})
    with pytest.raises(ConfigError, match="without quantization"):
        parse_options({"quantization_group_size": 64})
