"""InsertCachedOps and GatherLogits: state inputs by spec, shared batch inputs, logits for wanted rows only."""

import torch
from torch import Tensor, nn

from autodeploy.graph.levels import Level
from autodeploy.graph.model_graph import ModelGraph
from autodeploy.graph.verify import verify
from autodeploy.ops import linear
from autodeploy.ops.state import PagedState, SlotState
from autodeploy.transforms.cache.gather_logits import GatherLogits
from autodeploy.transforms.cache.insert_cached_ops import InsertCachedOps
from autodeploy.transforms.pipeline import default_pipeline
from tests.graphs import Sketch, attention_model, captured, causal_sdpa, counts
from tests.ops.mixers import decaying_sum


def _hybrid() -> nn.Module:
    attention = attention_model(causal_sdpa)

    def body(self: nn.Module, x: Tensor) -> Tensor:
        return self.second(decaying_sum(self.first(x), self.decay, None))

    second = attention_model(causal_sdpa).layer
    return Sketch(body, first=attention.layer, second=second, decay=nn.Parameter(torch.rand(16)))


def _canonical(model: nn.Module) -> ModelGraph:
    graph = captured(model)
    list(default_pipeline(torch.device("cpu")).stages[0].run(graph))
    return graph


def test_a_mixture_gets_each_ones_states_and_one_set_of_batch_inputs() -> None:
    graph = _canonical(_hybrid())
    report = InsertCachedOps().run(graph)
    assert (report.expected, report.rewritten) == (3, 3)
    kinds = {spec.name: type(spec) for spec in graph.states}
    assert kinds == {
        "first_key_cache": PagedState,
        "first_value_cache": PagedState,
        "decaying_sum_sums": SlotState,
        "second_key_cache": PagedState,
        "second_value_cache": PagedState,
    }
    names = [str(node.target) for node in graph.inputs()]
    assert names[-5:] == list(kinds), "states come after batch inputs, in the order of the graph"
    assert sorted(names[:-5]) == sorted(
        ["input_ids", "position_ids", "cu_seqlens", "seq_lens", "page_table_full", "slot_mapping_full", "state_slots"]
    )
    assert counts(graph)["cached_attention"] == 2 and counts(graph)["cached_decaying_sum"] == 1


def test_logits_only_for_wanted_rows() -> None:
    graph = _canonical(_hybrid())
    InsertCachedOps().run(graph)
    assert GatherLogits().run(graph).rewritten == 1
    head = graph.nodes(linear)[-1]
    assert head.args[0].target == torch.ops.aten.index_select.default  # type: ignore[union-attr]
    (result,) = graph.graph.output_node().args
    assert result.meta["val"].dim() == 2  # type: ignore[union-attr]
    verify(graph, Level.CACHED)


def test_logits_are_picked_at_the_output_when_no_head_is_found() -> None:
    class NoHead(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = attention_model(causal_sdpa)

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.inner(input_ids).log_softmax(-1)

    graph = _canonical(NoHead())
    InsertCachedOps().run(graph)
    report = GatherLogits().run(graph)
    assert report.rewritten == 0 and "no linear head" in report.refused[0]
    verify(graph, Level.CACHED)
