"""UsePositionIds: learned positions and rotary tables counted from the row's start follow each sequence instead."""

import torch
from torch import Tensor, nn

from autodeploy.transforms.canonicalize.use_position_ids import UsePositionIds
from tests.graphs import Sketch, captured, run


def _alone(model: nn.Module, lengths: list[int]) -> Tensor:
    ids = torch.randint(0, 32, (1, sum(lengths)), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return torch.cat([model(part) for part in ids.split(lengths, dim=1)], dim=1)


def _check(model: nn.Module, sites: int) -> None:
    graph = captured(model)
    wrong = run(graph, model, [4, 5])
    report = UsePositionIds().run(graph)
    assert (report.found, report.rewritten) == (sites, sites)
    right = run(graph, model, [4, 5])
    torch.testing.assert_close(right, _alone(model, [4, 5]), rtol=1e-6, atol=1e-6)
    assert not torch.allclose(wrong, right), "the negative control: without the transform the positions are wrong"


def test_learned_positions_by_arange() -> None:
    def body(self: nn.Module, x: Tensor) -> Tensor:
        return x + self.table(torch.arange(x.shape[1], device=x.device))

    _check(Sketch(body, table=nn.Embedding(64, 16)), 1)


def test_table_prefix_of_a_weight() -> None:
    def body(self: nn.Module, x: Tensor) -> Tensor:
        return x + self.table[: x.shape[1]]

    _check(Sketch(body, table=nn.Parameter(torch.randn(64, 16))), 1)


def test_table_prefix_of_a_constant_along_another_dimension() -> None:
    def body(self: nn.Module, x: Tensor) -> Tensor:
        return x * self.table[:, : x.shape[1]]

    _check(Sketch(body, table=torch.randn(1, 64, 16)), 1)


def test_near_miss_prefix_of_another_length() -> None:
    def body(self: nn.Module, x: Tensor) -> Tensor:
        return x + self.table[:1]

    graph = captured(Sketch(body, table=torch.randn(64, 16)))
    assert UsePositionIds().run(graph).found == 0
