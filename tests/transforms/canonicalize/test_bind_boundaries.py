"""BindBoundaries: a user's mixer called without boundaries gets the packed row's."""

import torch
from torch import Tensor, nn

from autodeploy.transforms.canonicalize.bind_boundaries import BindBoundaries
from tests.graphs import Sketch, captured, run
from tests.ops.mixers import decaying_sum


def _model(boundaries: bool = False) -> nn.Module:
    def body(self: nn.Module, x: Tensor) -> Tensor:
        whole = torch.tensor([0, 4], dtype=torch.int32) if boundaries else None
        return decaying_sum(x, self.decay, whole)

    return Sketch(body, decay=nn.Parameter(torch.rand(16)))


def test_fires_and_keeps_sequences_apart() -> None:
    model = _model()
    graph = captured(model)
    assert BindBoundaries().run(graph).rewritten == 1
    ids = torch.randint(0, 32, (1, 9), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        alone = torch.cat([model(ids[:, :4]), model(ids[:, 4:])], dim=1)
    torch.testing.assert_close(run(graph, model, [4, 5]), alone)


def test_near_miss_boundaries_that_the_model_gives_itself_stay() -> None:
    assert BindBoundaries().run(captured(_model(boundaries=True))).rewritten == 0
