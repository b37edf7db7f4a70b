"""DropNoOps: what changes nothing goes, what changes something stays."""

import torch
from torch import Tensor, nn

from autodeploy.transforms.canonicalize.drop_no_ops import DropNoOps
from tests.graphs import Sketch, captured, run


def test_no_ops_go_and_numbers_stay() -> None:
    def body(self: nn.Module, x: Tensor) -> Tensor:
        x = x.to(torch.float32) * 1.0
        x = nn.functional.dropout(x, 0.5, training=False)[:, :]
        return x.transpose(1, 2).transpose(2, 1).contiguous()

    model = Sketch(body)
    graph = captured(model)
    before = run(graph, model)
    assert DropNoOps().run(graph).rewritten >= 4
    calls = [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]
    assert calls == ["aten.embedding.default", "aten.linear.default"]
    assert torch.equal(run(graph, model), before)


def test_near_misses_stay() -> None:
    def body(self: nn.Module, x: Tensor) -> Tensor:
        x = (x.to(torch.float64) * 1.5).to(torch.float32)
        return x.transpose(1, 2).transpose(0, 1).permute(1, 2, 0)

    model = Sketch(body)
    graph = captured(model)
    before = run(graph, model)
    assert DropNoOps().run(graph).rewritten == 0
    assert torch.equal(run(graph, model), before)
