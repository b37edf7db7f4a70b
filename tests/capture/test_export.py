"""Capture: symbolic sizes, no weight touched, the model left as it was, and errors that name module and line."""

import pytest
import torch
from torch import Tensor, nn
from transformers import DeepseekV32Config, DeepseekV32ForCausalLM

from autodeploy.capture.export import capture
from autodeploy.errors import CaptureError
from autodeploy.graph.levels import Level
from autodeploy.graph.verify import verify
from autodeploy.models.instantiate import instantiate
from tests import tiny
from tests.graphs import Sketch, attention_model, captured, causal_sdpa, counts, run


@pytest.mark.parametrize("name", tiny.TINY)
def test_captured_graph_gives_the_models_logits(name: str) -> None:
    model = tiny.TINY[name]()
    graph = capture(model)
    verify(graph, Level.CAPTURED)
    assert counts(graph)["captured_attention"] == graph.writes("attention") == model.config.num_hidden_layers
    ids = torch.randint(0, 32, (1, 11), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = model(ids).logits
    torch.testing.assert_close(run(graph, model, [11], seed=3), expected, rtol=1e-4, atol=1e-4)


def test_no_parameter_needs_storage() -> None:
    config = tiny.TINY["llama"]().config
    graph = capture(instantiate(config, dtype=torch.bfloat16))
    assert all(parameter.is_meta for parameter in graph.module.parameters())
    assert all(recipe.dtype == torch.bfloat16 for recipe in graph.weights.values())


def test_model_is_left_as_it_was() -> None:
    model = tiny.TINY["llama"]()
    before = {name: id(parameter) for name, parameter in model.named_parameters()}
    implementation = model.config._attn_implementation
    capture(model)
    assert {name: id(parameter) for name, parameter in model.named_parameters()} == before
    assert model.config._attn_implementation == implementation
    assert not any("forward" in vars(module) for module in model.modules())
    model(torch.zeros(1, 3, dtype=torch.int64))


def test_length_and_count_are_symbolic() -> None:
    graph = captured(attention_model(causal_sdpa))
    for name in ("input_ids", "cu_seqlens"):
        node = graph.input(name)
        assert node is not None and isinstance(node.meta["val"].shape[-1], torch.SymInt)
    assert graph.max_length is None


def test_a_table_of_positions_bounds_the_length() -> None:
    def body(self: nn.Module, x: Tensor) -> Tensor:
        return x + self.table[: x.shape[1]]

    assert captured(Sketch(body, table=torch.randn(64, 16))).max_length == 64


class _Loop(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        for value in x.sum(-1).flatten().tolist():
            if value > 0:
                x = x + 1
        return x


def test_untraceable_code_names_module_and_line() -> None:
    model = Sketch(lambda self, x: self.loop(x), loop=_Loop())
    with pytest.raises(CaptureError, match=r"in module model\.loop \(_Loop\)|in module loop \(_Loop\)") as caught:
        captured(model)
    assert "test_export.py" in str(caught.value) and "adding-an-op" in str(caught.value)


class _Counting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return x + self.calls


def test_a_model_that_updates_a_buffer_is_refused() -> None:
    with pytest.raises(CaptureError, match="updates its own buffer"):
        captured(Sketch(lambda self, x: self.counting(x), counting=_Counting()))


def test_a_result_that_is_no_logits_is_refused() -> None:
    class Wrong(nn.Module):
        def forward(self, input_ids: Tensor) -> dict[str, Tensor]:
            return {"scores": input_ids}

    with pytest.raises(CaptureError, match="returns dict; expected logits"):
        captured(Wrong())


def test_updates_of_activations_in_place_become_new_tensors() -> None:
    def body(self: nn.Module, x: Tensor) -> Tensor:
        x = self.layer(x * 2)
        x.add_(1)
        x[..., 0] = 0
        return x

    model = Sketch(body, layer=attention_model(causal_sdpa).layer)
    graph = captured(model)
    verify(graph, Level.CAPTURED)
    ids = torch.randint(0, 32, (1, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(run(graph, model, [9]), model(ids))


def test_a_row_is_longer_than_what_an_indexer_chooses() -> None:
    """Else the graph would hold for sequences only in which every token is chosen."""
    config = DeepseekV32Config(
        vocab_size=64, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8, index_n_heads=2,
        index_head_dim=16, index_topk=64, first_k_dense_replace=1, intermediate_size=32,
    )  # fmt: skip
    graph = capture(DeepseekV32ForCausalLM(config).eval())
    assert graph.max_length is None
    (choice,) = graph.nodes(torch.ops.aten.topk.default)
    assert "64" in str(choice.meta["val"][1].shape[-1])
