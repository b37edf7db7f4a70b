"""Segments: where a graph is cut, that nothing is lost there, and that values are forgotten when nobody reads them."""

import torch

from autodeploy.build import resolve_device, transform
from autodeploy.capture.export import capture
from autodeploy.checkpoint.index import ModuleReader
from autodeploy.checkpoint.load import load_weights
from autodeploy.compile.bind import bind_kernels
from autodeploy.compile.segments import Cut, Segments
from autodeploy.config import CompileOptions
from autodeploy.debug.graph_run import PAGE_SIZE, Schedule, packed, run_function, token_by_token
from autodeploy.graph.model_graph import ModelGraph
from tests import tiny

CPU = resolve_device("cpu")


def lowered(name: str) -> ModelGraph:
    model = getattr(tiny, name)()
    graph = capture(model)
    transform(graph, CompileOptions(), CPU)
    for weight, tensor in load_weights(graph.weights, ModuleReader(model).read, device=CPU).items():
        setattr(graph.module, weight, torch.nn.Parameter(tensor, requires_grad=False))
    return graph


def segments_of(graph: ModelGraph) -> Segments:
    cut = Cut(graph)
    bind_kernels(graph)
    return cut.segments()


def logits(graph: ModelGraph, segments: Segments, schedule: Schedule, rows: list[torch.Tensor]) -> torch.Tensor:
    names = [str(node.target) for node in graph.inputs()]
    return run_function(lambda *inputs: segments.run(dict(zip(names, inputs, strict=True))), graph, rows, schedule, CPU)


def test_a_model_is_cut_at_attention_and_before_its_head() -> None:
    graph = lowered("llama")
    mixers = [node.name for node, op in graph.op_nodes() if op.is_cached]
    segments = segments_of(graph)
    kinds = [segment.is_region for segment in segments.segments]
    assert kinds == [True, False] * 4 and segments.unsafe == ()
    calls = [segment for segment in segments.segments if not segment.is_region]
    assert [call.outputs for call in calls[:3]] == [(name,) for name in mixers]
    assert calls[3].outputs == (segments.result,) and "logits_indices" in calls[3].inputs
    by_sequence = {"cu_seqlens", "seq_lens", "page_table_full", "logits_indices"}
    for segment in segments.segments:
        assert not segment.is_region or not by_sequence & {*segment.inputs}


def test_segments_give_what_the_graph_gives() -> None:
    rows = [torch.tensor(prompt) for prompt in tiny.prompts(3, longest=20)]
    for name in ("gemma3_text", "bamba", "qwen3_next"):
        graph = lowered(name)
        segments = segments_of(graph)
        assert max(map(len, rows)) > PAGE_SIZE
        for schedule in (packed(rows), token_by_token(rows)):
            expected = run_function(graph.module.forward, graph, rows, schedule, CPU)
            assert torch.equal(logits(graph, segments, schedule, rows), expected)


def test_values_are_forgotten_behind_their_last_reader() -> None:
    segments = segments_of(lowered("llama"))
    alive: set[str] = set()
    most = 0
    for segment in segments.segments:
        assert {*segment.inputs} & {name for other in segments.segments for name in other.outputs} <= alive
        alive |= {*segment.outputs}
        most = max(most, len(alive))
        alive -= {*segment.unread}
    assert not alive and most <= 10
