"""What is let through gives an element the same bits wherever it stands; what does not is refused by name."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from autodeploy.build import transform
from autodeploy.capture.export import capture
from autodeploy.config import CompileOptions
from autodeploy.errors import UnsupportedModelError
from autodeploy.graph.model_graph import ModelGraph
from autodeploy.transforms.lower.invariant_operators import EXACT, ROW_BY_ROW, SAME_EVERYWHERE
from tests.graphs import Sketch, attention_model, causal_sdpa

OPTIONS = CompileOptions(batch_invariant=True)
ROWS: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda x: x.softmax(-1),
    "log_softmax": lambda x: x.log_softmax(-1),
    "topk": lambda x: x.topk(4, -1).values,
    "sort": lambda x: x.sort(-1).values,
    "argmax": lambda x: x.argmax(-1),
    "layer_norm": lambda x: F.layer_norm(x, x.shape[-1:]),
}


def varies(function: Callable[[Tensor], Tensor], x: Tensor) -> bool:
    """Whether some stretch of entries gives other bits by itself than within the whole."""
    whole = function(x)
    return any(
        not torch.equal(function(x[at : at + count].clone()), whole[at : at + count])
        for count in (*range(1, 40), 57, 100)
        for at in (0, 1, 3, 8, 17, 100)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_let_through_does_not_vary(dtype: torch.dtype) -> None:
    x = (4 * torch.randn(400, generator=torch.Generator().manual_seed(0))).abs().to(dtype)
    for name in sorted(SAME_EVERYWHERE | {"sqrt", "reciprocal", "neg"}):
        assert name in SAME_EVERYWHERE | EXACT
        assert not varies(getattr(torch, name), x), name
    for exponent in (2, 3):
        assert not varies(lambda x, exponent=exponent: x.pow(exponent), x), exponent
    rows = torch.randn(200, 96, generator=torch.Generator().manual_seed(1)).to(dtype)
    assert ROWS.keys() | {"_softmax"} == ROW_BY_ROW
    for name, function in ROWS.items():
        assert not varies(function, rows), name


def test_the_comparison_sees_what_varies() -> None:
    assert varies(lambda x: x + len(x) * 1e-3, torch.ones(400))


def lowered(body: Callable[[Sketch, Tensor], Tensor], **parts: object) -> ModelGraph:
    graph = capture(Sketch(body, **parts))
    transform(graph, OPTIONS, torch.device("cpu"))
    return graph


def test_an_operator_that_may_vary_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedModelError, match=r"batch_invariant: sum .*leave batch_invariant out"):
        lowered(lambda self, x: x * x.sum(-1, keepdim=True))
    with pytest.raises(UnsupportedModelError, match="batch_invariant: sigmoid"):
        lowered(lambda self, x: x.sigmoid())
    with pytest.raises(UnsupportedModelError, match="softmax of another dimension"):
        lowered(lambda self, x: x.view(1, -1, 4, 4).softmax(2).reshape(x.shape))
    assert lowered(lambda self, x: x.view(1, -1, 4, 4).softmax(3).reshape(x.shape) + x.tanh())


def test_an_op_without_a_kernel_that_promises_it_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert lowered(lambda self, x: self.layer(x), layer=attention_model(causal_sdpa).layer)
    monkeypatch.setenv("AUTODEPLOY_NATIVE", "0")
    graph = capture(attention_model(causal_sdpa))
    with pytest.raises(UnsupportedModelError, match=r"batch_invariant: no kernel of \w+ promises"):
        transform(graph, OPTIONS, torch.device("cpu"))
