"""MatchNorm and the probes at capture: norms become ops whoever wrote them; what is none stays."""

import torch
from torch import nn

from autodeploy.transforms.canonicalize.match_norm import MatchNorm
from tests.graphs import Sketch, captured, counts, run


def test_torch_norms_become_ops() -> None:
    model = Sketch(lambda self, x: self.rms(self.layer(x)), layer=nn.LayerNorm(16, eps=1e-3), rms=nn.RMSNorm(16))
    graph = captured(model)
    before = run(graph, model)
    MatchNorm().run(graph)
    assert counts(graph)["layer_norm"] == 1 and counts(graph)["rms_norm"] == 1
    torch.testing.assert_close(run(graph, model), before, rtol=1e-5, atol=1e-6)


def test_functional_rms_norm() -> None:
    model = Sketch(lambda self, x: nn.functional.rms_norm(x, (16,), self.weight), weight=nn.Parameter(torch.randn(16)))
    graph = captured(model)
    before = run(graph, model)
    assert MatchNorm().run(graph).rewritten == 1
    torch.testing.assert_close(run(graph, model), before, rtol=1e-5, atol=1e-6)


def test_near_miss_norm_over_two_dimensions_is_refused() -> None:
    def body(self: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.layer_norm(x.view(1, -1, 4, 4), (4, 4)).view(x.shape)

    report = MatchNorm().run(captured(Sketch(body)))
    assert report.rewritten == 0 and "over 2 dimensions" in report.refused[0]
