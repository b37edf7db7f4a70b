"""Indexers: what a model attends to becomes part of the op when the numbers agree, and is refused when they do not."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from autodeploy.ops.sparse_attention import index_scores
from autodeploy.transforms.canonicalize.mask_probe import MaskRefused
from autodeploy.transforms.canonicalize.read_selection import Selection, read_selection
from tests.graphs import Sketch, captured, run

aten = torch.ops.aten


class Indexer(nn.Module):
    """Index queries, keys and weights, and the scores a model makes of them."""

    def __init__(self, form: Callable[[Tensor, Tensor, Tensor], Tensor], top_k: int = 3):
        super().__init__()
        self.form, self.top_k = form, top_k
        self.q, self.k, self.w = nn.Linear(16, 8), nn.Linear(16, 4), nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.shape[1]
        scores = self.form(self.q(x).view(1, tokens, 2, 4), self.k(x), self.w(x))
        indices = scores.topk(self.top_k, dim=-1).indices.to(torch.int32)
        return x + indices.sum() * 0


def _causal(scores: Tensor) -> Tensor:
    positions = torch.arange(scores.shape[-2])
    return scores.masked_fill(positions[None] > positions[:, None], float("-inf"))


def weighted(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(-1, -2).unsqueeze(1)) * 0.5
    return _causal(torch.matmul(w.unsqueeze(-2), scores.relu()).squeeze(-2))


def per_head_blocks(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    scores = _causal(q.transpose(1, 2) @ k[:, None].transpose(-1, -2))
    tokens = scores.shape[-1]
    blocks = -(-tokens // 4)
    padded = nn.functional.pad(scores, (0, blocks * 4 - tokens), value=float("-inf"))
    best = padded.view(1, 2, tokens, blocks, 4).amax(-1)
    own = (torch.arange(tokens) // 4)[None, None, :, None].expand(1, 2, -1, 1)
    return best.scatter(-1, own, float("inf"))


def without_relu(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(-1, -2).unsqueeze(1))
    return _causal(torch.matmul(w.unsqueeze(-2), scores).squeeze(-2))


def not_causal(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(-1, -2).unsqueeze(1))
    return torch.matmul(w.unsqueeze(-2), scores.relu()).squeeze(-2)


def negated(q: Tensor, k: Tensor, w: Tensor) -> Tensor:
    scores = torch.matmul(q, k.transpose(-1, -2).unsqueeze(1))
    return _causal(-torch.matmul(w.unsqueeze(-2), scores.relu()).squeeze(-2))


def _read(
    form: Callable[[Tensor, Tensor, Tensor], Tensor], block_size: int
) -> tuple[fx.Node, Selection, object, nn.Module]:
    torch.manual_seed(0)
    model = Sketch(lambda self, x: self.indexer(x), indexer=Indexer(form)).eval()
    graph = captured(model)
    (choice,) = graph.nodes(aten.topk.default)
    indices = next(
        node for node in graph.graph.nodes if node.target == aten.to.dtype and choice in node.args[0].all_input_nodes
    )
    output = graph.graph.output_node()
    return choice, read_selection(graph, indices, block_size, output), graph, model


@pytest.mark.parametrize(("form", "block_size", "local_blocks"), [(weighted, 1, 0), (per_head_blocks, 4, 1)])
def test_operands_and_facts_are_read(
    form: Callable[[Tensor, Tensor, Tensor], Tensor], block_size: int, local_blocks: int
) -> None:
    choice, selection, graph, model = _read(form, block_size)
    assert (selection.top_k, selection.local_blocks) == (3, local_blocks)
    assert (selection.index_weights is not None) == (form is weighted)
    operands = [
        selection.index_query,
        selection.index_key,
        *([selection.index_weights] if selection.index_weights else []),
    ]
    results = []
    for node in (choice.args[0], *operands):
        graph.graph.output_node().args = (node,)
        graph.clean = lambda: None  # type: ignore[method-assign]
        graph.module.recompile()
        results.append(run(graph, model, [9]))
    scores, query, key, *weights = results
    expected = index_scores(query[0], key[0], weights[0][0] if weights else None, block_size, local_blocks)
    order = scores.reshape(expected.shape).nan_to_num(neginf=-1e9, posinf=1e9).argsort(-1)
    assert torch.equal(order, expected.nan_to_num(neginf=-1e9, posinf=1e9).argsort(-1))


@pytest.mark.parametrize("form", [without_relu, not_causal, negated])
def test_near_misses_are_refused(form: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
    with pytest.raises(MaskRefused, match="a form that no fact expresses"):
        _read(form, 1)


def test_indices_that_are_no_best_scores_are_refused() -> None:
    graph = captured(Sketch(lambda self, x: x + torch.arange(x.shape[1])[:, None]))
    node = (
        graph.nodes(aten.arange.default)[0] if graph.nodes(aten.arange.default) else graph.graph.output_node().args[0]
    )
    with pytest.raises(MaskRefused, match="not the best of any scores"):
        read_selection(graph, node, 1, graph.graph.output_node())
