"""MatchAttention: each way to write attention becomes one node with facts; what cannot be expressed is refused."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from autodeploy.errors import GraphLevelError
from autodeploy.graph.levels import Level
from autodeploy.graph.verify import verify
from autodeploy.ops import attention
from autodeploy.transforms.canonicalize.match_attention import MatchAttention
from tests.graphs import attention_model, captured, causal_sdpa, counts, run

Core = Callable[[Tensor, Tensor, Tensor], Tensor]


def _mask(tokens: int, window: int | None = None, chunk: int | None = None) -> Tensor:
    i, j = torch.arange(tokens)[:, None], torch.arange(tokens)[None]
    mask = j <= i
    if window is not None:
        mask = mask & (j > i - window)
    if chunk is not None:
        mask = mask & (i // chunk == j // chunk)
    return mask


def sdpa_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=_mask(q.shape[2]))


def sdpa_window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=_mask(q.shape[2], window=3), scale=0.3)


def sdpa_wide_window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=_mask(q.shape[2], window=300))


def sdpa_wide_chunks(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=_mask(q.shape[2], chunk=300))


def sdpa_chunked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=_mask(q.shape[2], chunk=4))


def sdpa_float_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    mask = torch.full((q.shape[2], q.shape[2]), float("-inf")).triu(1)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def written_out(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(-2, -1)) / math.sqrt(4)
    scores = scores.masked_fill(~_mask(q.shape[2]), float("-inf"))
    return torch.matmul(F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype), v)


def written_out_scaled_query(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q * 0.4) @ k.transpose(2, 3)  # token-wise, so it may stay where it is
    scores = 5.0 * torch.tanh(scores / 5.0) + torch.full((q.shape[2], q.shape[2]), -1e9).triu(1)
    return F.dropout(scores.softmax(-1), p=0.1, training=False) @ v


def written_out_softcap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.tanh((q @ k.transpose(2, 3) * 0.5) / 5.0) * 5.0
    return (scores + torch.full((q.shape[2], q.shape[2]), -1e9).triu(1)).softmax(-1) @ v


def _slopes() -> Tensor:
    return torch.tensor([0.5, 0.25, 0.125, 0.0625])


def sdpa_position_bias(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    distance = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])[None]
    bias = torch.where(distance >= 0, -_slopes()[:, None, None] * distance, float("-inf"))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def three_dims_with_slopes_in_the_product(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Heads in the batch; a bias by the key's position, which softmax cannot tell from one by distance."""
    q, k, v = (x.reshape(4, -1, 4) for x in (q, k, v))
    bias = _slopes()[:, None, None] * torch.arange(q.shape[1])[None, None]
    scores = bias.baddbmm(q, k.transpose(1, 2), beta=1.0, alpha=0.5).view(1, 4, q.shape[1], -1)
    scores = scores + (~_mask(q.shape[1])).float() * torch.finfo(torch.float32).min
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype).view(4, q.shape[1], -1)
    return torch.bmm(weights, v).view(1, 4, -1, 4)


def einsum_with_tokens_first(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k)
    scores = torch.where(_mask(q.shape[1]), scores / 2.0, torch.tensor(torch.finfo(scores.dtype).min))
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v).transpose(1, 2)


def multiplied_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keep = _mask(q.shape[2]).float()
    scores = (q @ k.transpose(2, 3)) * 0.5
    return (scores * keep - 1e4 * (1 - keep)).softmax(-1) @ v


def clamped_from_below(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    smallest = torch.finfo(q.dtype).min
    scores = (q @ k.transpose(2, 3)) * 0.5 + torch.full((q.shape[2], q.shape[2]), smallest).triu(1)
    weights = torch.max(scores, torch.tensor(smallest)).softmax(-1)
    return weights.masked_fill(~_mask(q.shape[2]), 0.0) @ v


def in_place(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(2, 3)
    scores /= 2.0
    scores += torch.full((q.shape[2], q.shape[2]), float("-inf")).triu(1)
    return scores.softmax(-1) @ v


def window_in_a_table(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    table = torch.tril(torch.ones(200, 200, dtype=torch.bool))
    table = torch.bitwise_xor(table, torch.tril(table, -90))
    scores = (q @ k.transpose(2, 3)) * 0.5
    scores = torch.where(table[: q.shape[2], : q.shape[2]], scores, torch.finfo(q.dtype).min)
    return (scores + torch.full((q.shape[2], q.shape[2]), -1e9).triu(1)).softmax(-1) @ v


CORES: list[tuple[Core, dict[str, object]]] = [
    (causal_sdpa, {"causal": True, "scale": 0.5}),
    (sdpa_mask, {"causal": True}),
    (sdpa_window, {"causal": True, "sliding_window": 3, "scale": 0.3}),
    (sdpa_chunked, {"causal": True, "chunk_size": 4}),
    (sdpa_wide_window, {"causal": True, "sliding_window": 300}),
    (sdpa_wide_chunks, {"causal": True, "chunk_size": 300}),
    (sdpa_float_mask, {"causal": True}),
    (written_out, {"causal": True, "scale": 0.5}),
    (written_out_softcap, {"causal": True, "softcap": 5.0, "scale": 0.5}),
    (written_out_scaled_query, {"causal": True, "softcap": 5.0, "scale": 1.0}),
    (sdpa_position_bias, {"causal": True, "slopes": (0.5, 0.25, 0.125, 0.0625)}),
    (three_dims_with_slopes_in_the_product, {"causal": True, "scale": 0.5, "slopes": (0.5, 0.25, 0.125, 0.0625)}),
    (einsum_with_tokens_first, {"causal": True, "scale": 0.5}),
    (multiplied_mask, {"causal": True, "scale": 0.5}),
    (clamped_from_below, {"causal": True, "scale": 0.5}),
    (in_place, {"causal": True, "scale": 0.5}),
    (window_in_a_table, {"causal": True, "scale": 0.5, "sliding_window": 90}),
]


@pytest.mark.parametrize(("core", "facts"), CORES, ids=lambda value: getattr(value, "__name__", ""))
def test_fires_with_the_right_facts_and_numbers(core: Core, facts: dict[str, object]) -> None:
    model = attention_model(core)
    graph = captured(model)
    before = run(graph, model, [9])
    report = MatchAttention().run(graph)
    assert (report.found, report.rewritten, report.refused) == (1, 1, ())
    assert counts(graph) == {"attention": 1}
    (node,) = graph.nodes(attention)
    arguments = attention.arguments(node.args, node.kwargs)
    absent = {"sliding_window": None, "chunk_size": None, "softcap": None, "slopes": None, "distance_logits": None}
    if "slopes" in facts:
        constant = getattr(graph.module, str(arguments["slopes"].target))
        torch.testing.assert_close(constant, torch.tensor(facts["slopes"]), rtol=1e-5, atol=1e-6)
        arguments["slopes"] = facts["slopes"]
    for name, value in (absent | facts).items():
        assert arguments[name] == (pytest.approx(value) if isinstance(value, float) else value), name
    verify(graph, Level.CANONICAL)
    torch.testing.assert_close(run(graph, model, [9]), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("core", [core for core, _ in CORES], ids=lambda core: core.__name__)
def test_packed_sequences_are_kept_apart(core: Core) -> None:
    model = attention_model(core)
    graph = captured(model)
    MatchAttention().run(graph)
    packed = run(graph, model, [4, 5])
    with torch.no_grad():
        ids = torch.randint(0, 32, (1, 9), generator=torch.Generator().manual_seed(0))
        alone = torch.cat([model(ids[:, :4]), model(ids[:, 4:])], dim=1)
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)


def test_repeated_heads_are_seen_through() -> None:
    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = (x[:, :, None].expand(1, 2, 2, x.shape[2], 4).reshape(1, 4, x.shape[2], 4) for x in (k, v))
        return causal_sdpa(q, k, v)

    model = attention_model(core, kv_heads=2)
    graph = captured(model)
    before = run(graph, model, [9])
    MatchAttention().run(graph)
    (node,) = graph.nodes(attention)
    assert node.args[1].meta["val"].shape[2] == 2  # type: ignore[union-attr]
    torch.testing.assert_close(run(graph, model, [9]), before, rtol=1e-5, atol=1e-5)


def test_shared_heads_may_be_broadcast_by_the_product() -> None:
    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = q.view(1, 2, 2, -1, 4), k[:, :, None], v[:, :, None]
        scores = (q @ k.transpose(-1, -2)) * 0.5 + torch.full((q.shape[3], q.shape[3]), -1e9).triu(1)
        return (scores.softmax(-1) @ v).view(1, 4, -1, 4)

    model = attention_model(core, kv_heads=2)
    graph = captured(model)
    before = run(graph, model, [9])
    MatchAttention().run(graph)
    (node,) = graph.nodes(attention)
    assert node.args[1].meta["val"].shape[2] == 2  # type: ignore[union-attr]
    torch.testing.assert_close(run(graph, model, [9]), before, rtol=1e-5, atol=1e-5)


def squared_distance(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    distance = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])[None]
    bias = torch.where(distance >= 0, -0.01 * distance**2, float("-inf"))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def mask_per_head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    windows = torch.tensor([3, 4, 5, 6])[:, None, None]
    distance = torch.arange(q.shape[2])[:, None] - torch.arange(q.shape[2])[None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(distance >= 0) & (distance < windows))


def rectified_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.transpose(2, 3)).relu() + torch.full((q.shape[2], q.shape[2]), -1e9).triu(1)
    return scores.softmax(-1) @ v


def weights_changed_after_the_softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.transpose(2, 3)) + torch.full((q.shape[2], q.shape[2]), -1e9).triu(1)
    return scores.softmax(-1).square() @ v


def neighbouring_scores(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.transpose(2, 3)).flip(1) + torch.full((q.shape[2], q.shape[2]), -1e9).triu(1)
    return scores.softmax(-1) @ v


def every_other_key(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    i, j = torch.arange(q.shape[2])[:, None], torch.arange(q.shape[2])[None]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(j <= i) & ((i - j) % 2 == 0))


def window_too_wide_to_try(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, attn_mask=_mask(q.shape[2], window=100_000))


@pytest.mark.parametrize(
    ("core", "reason"),
    [
        (squared_distance, "not linear in the distance"),
        (mask_per_head, "differs between heads"),
        (every_other_key, "none of causal"),
        (window_too_wide_to_try, "100000"),
        (rectified_scores, "changed between product and softmax"),
        (neighbouring_scores, "changed between product and softmax"),
        (weights_changed_after_the_softmax, "changed between softmax and values"),
    ],
)
def test_a_mask_that_is_no_fact_is_refused_by_name(core: Core, reason: str) -> None:
    graph = captured(attention_model(core))
    report = MatchAttention().run(graph)
    assert (report.found, report.rewritten) == (1, 0)
    assert reason in report.refused[0] and "layer" in report.refused[0]
    with pytest.raises(GraphLevelError, match="layer"):
        verify(graph, Level.CANONICAL)


def test_near_miss_softmax_over_features_is_left_alone() -> None:
    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return causal_sdpa(q.softmax(-1), k, v)

    graph = captured(attention_model(core))
    assert MatchAttention().run(graph).found == 1
    assert len(graph.nodes(torch.ops.aten.softmax.int)) == 1


def test_near_miss_value_dependent_mask_is_refused() -> None:
    def core(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=(q @ k.transpose(2, 3)) > 0)

    report = MatchAttention().run(captured(attention_model(core)))
    assert report.rewritten == 0 and "depends on" in report.refused[0]
