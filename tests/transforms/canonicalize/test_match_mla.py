"""MatchMLA: attention over one latent per token keeps the latent, with the same numbers; near misses are left alone."""

from typing import Any

import pytest
import torch
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

from autodeploy.capture.export import capture
from autodeploy.debug.shrink import tiny_model
from autodeploy.ops import attention, mla
from autodeploy.transforms.canonicalize.drop_no_ops import DropNoOps
from autodeploy.transforms.canonicalize.match_attention import MatchAttention
from autodeploy.transforms.canonicalize.match_linear import MatchLinear
from autodeploy.transforms.canonicalize.match_mla import MatchMLA
from tests.graphs import attention_model, captured, causal_sdpa, run

SIZES: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
    "q_lora_rank": 16, "kv_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 12,
    "first_k_dense_replace": 2, "intermediate_size": 48,
}  # fmt: skip


def test_fires_and_keeps_the_numbers_packed() -> None:
    model = tiny_model(DeepseekV3Config(**SIZES))
    assert isinstance(model, DeepseekV3ForCausalLM)
    graph = capture(model)
    for transform in (MatchAttention(), MatchLinear(), DropNoOps()):
        transform.run(graph)
    before = run(graph, model, [3, 6, 4])
    report = MatchMLA().run(graph)
    assert (report.found, report.rewritten, report.refused) == (2, 2, ())
    assert (len(graph.nodes(mla)), len(graph.nodes(attention))) == (2, 0)
    (shape,) = {spec.shape for spec in mla.states(**_values(graph.nodes(mla)[0])).values()}  # type: ignore[misc]
    latent, shared = graph.nodes(mla)[0].args[1:3]
    assert shape == (1, latent.meta["val"].shape[-1] + shared.meta["val"].shape[-1])  # type: ignore[union-attr]
    torch.testing.assert_close(run(graph, model, [3, 6, 4]), before, rtol=1e-4, atol=1e-5)


def _values(node: torch.fx.Node) -> dict[str, Any]:
    arguments = mla.arguments(node.args, node.kwargs)
    return {k: v.meta["val"] if isinstance(v, torch.fx.Node) else v for k, v in arguments.items()}


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_near_miss_keys_and_values_with_products_of_their_own(kv_heads: int) -> None:
    def core(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return causal_sdpa(q, k.repeat_interleave(4 // kv_heads, 1), v.repeat_interleave(4 // kv_heads, 1))

    graph = captured(attention_model(core, kv_heads=kv_heads))
    MatchAttention().run(graph)
    MatchLinear().run(graph)
    assert MatchMLA().run(graph).found == 0
    assert len(graph.nodes(attention)) == 1
