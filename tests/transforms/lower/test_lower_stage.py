"""The lower stage: every op gets a provider with the reasons kept, and devices are placed."""

import pytest
import torch
from torch import Tensor, nn

from autodeploy.errors import ConfigError, GraphLevelError
from autodeploy.graph.levels import Level
from autodeploy.graph.verify import verify
from autodeploy.ops import linear
from autodeploy.transforms.canonicalize.match_linear import MatchLinear
from autodeploy.transforms.lower.place_on_device import PlaceOnDevice
from autodeploy.transforms.lower.select_kernels import SelectKernels
from tests.graphs import Sketch, captured


@pytest.fixture
def narrow_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "kernels", dict(linear.kernels))

    def supports(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
        return None if weight.shape[0] <= 16 else f"at most 16 outputs, got {weight.shape[0]}"

    @linear.kernel("narrow", supports)
    def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return x @ weight.T


@pytest.mark.usefixtures("narrow_kernel")
def test_the_first_supporting_provider_is_chosen_and_reasons_are_kept() -> None:
    graph = captured(Sketch(lambda self, x: self.inner(x), inner=nn.Linear(16, 16, bias=False)))
    MatchLinear().run(graph)
    with pytest.raises(GraphLevelError, match="no provider"):
        verify_lowered_ops_only(graph)
    selection = SelectKernels(priority=("absent", "narrow"))
    selection.run(graph)
    assert graph.providers()["linear"] == {"narrow": 1, "torch": 1}
    assert selection.reasons["linear"] == {"narrow: at most 16 outputs, got 32"}


@pytest.mark.usefixtures("narrow_kernel")
def test_ops_can_be_left_to_the_reference_by_name() -> None:
    graph = captured(Sketch(lambda self, x: self.inner(x), inner=nn.Linear(16, 16, bias=False)))
    MatchLinear().run(graph)
    selection = SelectKernels(priority=("narrow",), without=("linear",))
    selection.run(graph)
    assert graph.providers()["linear"] == {"torch": 2}
    assert selection.reasons["linear"] == {"left to the reference, as asked"}
    with pytest.raises(ConfigError, match="no op is called linaer; there are"):
        SelectKernels(without=("linaer",)).run(graph)


def verify_lowered_ops_only(graph) -> None:  # type: ignore[no-untyped-def]
    graph.level = Level.CACHED
    verify(graph, Level.LOWERED)


def test_devices_are_placed() -> None:
    def body(self: nn.Module, x: Tensor) -> Tensor:
        return x + torch.ones(16, device=x.device)

    graph = captured(Sketch(body, table=torch.ones(2)))
    assert PlaceOnDevice(device=torch.device("cpu")).run(graph).rewritten == 0
    assert PlaceOnDevice(device=torch.device("meta")).run(graph).rewritten == 1
    (ones,) = graph.nodes(torch.ops.aten.ones.default)
    assert ones.kwargs["device"] == torch.device("meta")
    values = [node.meta["val"] for node in graph.graph.nodes if "val" in node.meta]
    assert all(v.device.type == "meta" for v in values if isinstance(v, torch.Tensor)), "fake values move along"
