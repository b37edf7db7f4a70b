"""AssignStreams: branches are found by what depends on what, gathered and marked; near misses stay as they are."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from autodeploy.graph.model_graph import BRANCH, ModelGraph
from autodeploy.transforms.cache.insert_cached_ops import InsertCachedOps
from autodeploy.transforms.canonicalize.match_attention import MatchAttention
from autodeploy.transforms.canonicalize.match_linear import MatchLinear
from autodeploy.transforms.lower.assign_streams import AssignStreams
from tests.graphs import Attention, Sketch, captured, causal_sdpa, run

CUDA = torch.device("cuda")
WEIGHTS = {"narrow": nn.Linear(16, 16, bias=False), "up": nn.Linear(16, 64), "down": nn.Linear(64, 16)}
LIGHTER_BYTES = 16 * 16 * 4


def side_by_side(self: Sketch, x: Tensor) -> Tensor:
    """The lighter branch stands around the heavier one, and what reads it before the join stands within."""
    narrow = self.narrow(x)
    wide = self.up(x)
    scaled = narrow * 2
    early = narrow.tanh()
    wide = self.down(F.silu(wide))
    return x + scaled.sin() * wide + early


def marked(graph: ModelGraph) -> list[list[str]]:
    """Names of the calls of each branch, in order."""
    found: dict[int, list[str]] = {}
    for node in graph.graph.nodes:
        if BRANCH in node.meta:
            found.setdefault(node.meta[BRANCH], []).append(str(node.target).split(".")[1])
    return list(found.values())


def test_the_lighter_branch_is_gathered_and_marked() -> None:
    model = Sketch(side_by_side, **WEIGHTS)
    graph, before = captured(model), captured(model)
    MatchLinear().run(graph)
    report = AssignStreams(least_bytes=LIGHTER_BYTES, device=CUDA).run(graph)
    assert (report.found, report.rewritten, report.refused) == (1, 1, ())
    assert marked(graph) == [["linear", "mul", "sin"]]
    names = [str(node.target).split(".")[1] for node in graph.graph.nodes if node.op == "call_function"]
    assert names.index("sin") < names.index("silu") < names.index("tanh")
    graph.module.recompile()
    assert torch.equal(run(graph, model), run(before, model))


def test_what_is_light_is_left() -> None:
    graph = captured(Sketch(side_by_side, **WEIGHTS))
    report = AssignStreams(least_bytes=LIGHTER_BYTES + 1, device=CUDA).run(graph)
    assert report.found == 0 and not marked(graph)


def test_a_chain_has_no_branches() -> None:
    """A residual stream beside a block is no branch: it has nothing to do meanwhile."""
    graph = captured(Sketch(lambda self, x: x + self.down(F.silu(self.up(x))), **WEIGHTS))
    assert AssignStreams(least_bytes=1, device=CUDA).run(graph).found == 0


def test_token_mixers_are_left_in_place() -> None:
    layer = Attention(causal_sdpa)
    graph = captured(Sketch(lambda self, x: self.layer(x) * self.down(self.up(x)), layer=layer, **WEIGHTS))
    MatchAttention().run(graph)
    InsertCachedOps().run(graph)
    order = [node.name for node in graph.graph.nodes]
    report = AssignStreams(least_bytes=2 * LIGHTER_BYTES, device=CUDA).run(graph)
    assert (report.found, report.rewritten) == (1, 0)
    assert "a token mixer stands between" in report.refused[0]
    assert [node.name for node in graph.graph.nodes] == order


def test_without_a_device_the_graph_stays_and_the_report_says_so() -> None:
    graph = captured(Sketch(side_by_side, **WEIGHTS))
    order = [node.name for node in graph.graph.nodes]
    report = AssignStreams(least_bytes=LIGHTER_BYTES).run(graph)
    assert (report.found, report.rewritten) == (1, 0) and not marked(graph)
    assert report.refused == ("1 branches: the device is cpu, and streams are of CUDA devices",)
    assert [node.name for node in graph.graph.nodes] == order
