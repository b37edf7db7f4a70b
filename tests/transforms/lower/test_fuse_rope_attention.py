"""FuseRopeAttention: rope and attention become one call of their provider; near misses stay as they are."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from autodeploy.checkpoint.index import ModuleReader
from autodeploy.debug.graph_run import Weights, chunks, run_graph
from autodeploy.graph.levels import Level
from autodeploy.graph.model_graph import ModelGraph
from autodeploy.graph.verify import verify
from autodeploy.ops import Kernel, cached_attention, cached_rope_attention, rope
from autodeploy.transforms.lower.fuse_rope_attention import FuseRopeAttention
from autodeploy.transforms.lower.select_kernels import SelectKernels
from autodeploy.transforms.pipeline import default_pipeline
from tests.graphs import attention_model, captured, causal_sdpa, counts

Core = Callable[[Tensor, Tensor, Tensor], Tensor]
PROVIDER = "both"
ROWS = [torch.arange(length) for length in (9, 4, 13)]


@pytest.fixture(autouse=True)
def _provider_of_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """A provider of the two ops and of the one, by their references."""
    for op in (rope, cached_attention, cached_rope_attention):
        monkeypatch.setitem(op.kernels, PROVIDER, Kernel(PROVIDER, op.reference, lambda **_: None))


def turned(query: Tensor, key: Tensor, rotary_dim: int = 4) -> tuple[Tensor, Tensor]:
    """Queries and keys `[1, heads, T, 4]`, turned by their positions."""
    positions = torch.arange(query.shape[2], device=query.device)
    angle = (positions[:, None] / torch.arange(1, rotary_dim // 2 + 1)).repeat(1, 2)[None]
    query, key = rope(query.transpose(1, 2), key.transpose(1, 2), angle.cos(), angle.sin())
    return query.transpose(1, 2), key.transpose(1, 2)


def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return causal_sdpa(*turned(query, key), value)


def selected(core: Core, selection: SelectKernels | None = None) -> tuple[ModelGraph, Weights]:
    """The graph around an attention core once kernels are chosen, and its weights."""
    model = attention_model(core)
    graph = captured(model)
    for stage in default_pipeline(torch.device("cpu")).stages[:-1]:
        list(stage.run(graph))
    (selection or SelectKernels(priority=(PROVIDER,))).run(graph)
    return graph, Weights(ModuleReader(model).read)


def turned_in_part(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Two of four dimensions, which the op can do."""
    return causal_sdpa(*turned(query, key, rotary_dim=2), value)


@pytest.mark.parametrize("core", [plain, turned_in_part])
def test_both_become_one_call_with_the_same_numbers(core: Core) -> None:
    graph, weights = selected(core)
    before = run_graph(graph, weights, ROWS, chunks(ROWS)).logits
    report = FuseRopeAttention().run(graph)
    assert (report.expected, report.found, report.rewritten, report.refused) == (1, 1, 1, ())
    assert graph.providers()["cached_rope_attention"] == {PROVIDER: 1}
    assert not {"rope", "cached_attention"} & counts(graph).keys()
    verify(graph, Level.LOWERED)
    torch.testing.assert_close(run_graph(graph, weights, ROWS, chunks(ROWS)).logits, before, rtol=0, atol=0)


def key_is_scaled(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """As a norm behind the turning would."""
    query, key = turned(query, key)
    return causal_sdpa(query, F.normalize(key, dim=-1), value)


def part_is_cut_out(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Heads are taken apart around the turning."""
    parts = turned(query[..., :2], key[..., :2], rotary_dim=2)
    query, key = (torch.cat((part, x[..., 2:]), dim=-1) for part, x in zip(parts, (query, key), strict=True))
    return causal_sdpa(query, key, value)


@pytest.mark.parametrize("core", [key_is_scaled, part_is_cut_out, causal_sdpa])
def test_a_key_that_is_not_turned_last_is_no_site(core: Core) -> None:
    graph, _ = selected(core)
    before = counts(graph)
    report = FuseRopeAttention().run(graph)
    assert (report.expected, report.found, report.rewritten, report.refused) == (0, 0, 0, ())
    assert counts(graph) == before and before["cached_attention"] == 1


def key_is_read_again(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    query, key = turned(query, key)
    return causal_sdpa(query, key, value) + key


def query_is_read_again(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    query, key = turned(query, key)
    return causal_sdpa(query, key, value) + query


def two_layers_share(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    query, key = turned(query, key)
    return causal_sdpa(query, key, value) + causal_sdpa(query, key, value * value)


def two_layers_share_keys(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    first, key = turned(query, key)
    return causal_sdpa(first, key, value) + causal_sdpa(query, key, value)


def keys_are_values(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    query, key = turned(query, key)
    return causal_sdpa(query, key, key)


def queries_are_not_turned(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return causal_sdpa(query, turned(query, key)[1], value)


ELSEWHERE, APART = "something else reads what was turned", "its queries were not turned together with its keys"


@pytest.mark.parametrize(
    ("core", "reasons"),
    [
        (key_is_read_again, [ELSEWHERE]),
        (query_is_read_again, [ELSEWHERE]),
        (two_layers_share, [ELSEWHERE, ELSEWHERE]),
        (two_layers_share_keys, [ELSEWHERE, APART]),
        (keys_are_values, ["it reads what was turned in another place too"]),
        (queries_are_not_turned, [APART]),
    ],
)
def test_what_others_need_is_refused_with_a_reason(core: Core, reasons: list[str]) -> None:
    graph, _ = selected(core)
    before = counts(graph)
    report = FuseRopeAttention().run(graph)
    assert (report.expected, report.found, report.rewritten) == (len(reasons), len(reasons), 0)
    assert all(reason in refused for reason, refused in zip(reasons, report.refused, strict=True))
    assert all(refused.startswith("attention in layer: ") for refused in report.refused)
    assert counts(graph) == before and before["rope"] == 1


def test_a_kernel_that_refuses_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def supports(key: Tensor, cos: Tensor, **_: object) -> str:
        return f"keys of {key.shape[3]} turned by {cos.shape[2]}"

    refusing = Kernel(PROVIDER, cached_rope_attention.reference, supports)
    monkeypatch.setitem(cached_rope_attention.kernels, PROVIDER, refusing)
    graph, _ = selected(plain)
    report = FuseRopeAttention().run(graph)
    assert (report.found, report.rewritten) == (1, 0)
    assert report.refused == (f"attention in layer: {PROVIDER}: keys of 4 turned by 4",)


@pytest.mark.parametrize(
    "selection",
    [
        SelectKernels(),
        SelectKernels(priority=("cpu",)),
        SelectKernels(priority=("cpu",), mixer_priority=(PROVIDER,)),
        SelectKernels(priority=(PROVIDER,), mixer_priority=()),
        SelectKernels(priority=(PROVIDER,), without=("rope",)),
    ],
    ids=["references", "a provider of two kernels", "rope by another", "attention by another", "rope left out"],
)
def test_ops_of_other_providers_are_no_sites(selection: SelectKernels) -> None:
    graph, _ = selected(plain, selection)
    before = graph.providers()
    report = FuseRopeAttention().run(graph)
    assert (report.found, report.rewritten, report.refused) == (0, 0, ())
    assert graph.providers() == before and before["rope"].keys() | before["cached_attention"].keys() != {PROVIDER}
