"""Mixers behind functions: transformers' own are known by their numbers, near misses and odd calls are left alone."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.bamba import modeling_bamba
from transformers.models.falcon_mamba import modeling_falcon_mamba
from transformers.models.kimi_linear import modeling_kimi_linear
from transformers.models.lfm3 import modeling_lfm3
from transformers.models.mamba import modeling_mamba
from transformers.models.qwen3_next import modeling_qwen3_next
from transformers.models.zamba import modeling_zamba

from autodeploy.capture.mixers import Recogniser, interface_of, mixers_recognised
from autodeploy.errors import GraphLevelError
from autodeploy.graph.levels import Level
from autodeploy.graph.verify import verify
from tests.graphs import Sketch, captured, counts

CONV = {"weight": torch.randn(6, 4), "bias": torch.randn(6), "activation": "silu"}
SCAN = {
    "dt": torch.rand(1, 6, 9),
    "A": -torch.rand(6, 5),
    "B": torch.randn(1, 5, 9),
    "C": torch.randn(1, 5, 9),
    "D": torch.randn(6),
    "z": torch.randn(1, 6, 9),
    "delta_bias": torch.randn(6),
    "delta_softplus": True,
}
SSD = {
    "dt": torch.rand(1, 9, 4),
    "A": -torch.rand(4),
    "B": torch.randn(1, 9, 2, 5),
    "C": torch.randn(1, 9, 2, 5),
    "chunk_size": 256,
    "dt_bias": torch.randn(4),
    "dt_softplus": True,
    "dt_limit": (0.1, 1.0),
}
DELTA = {
    "key": torch.randn(1, 9, 2, 8),
    "value": torch.randn(1, 9, 4, 8),
    "g": -torch.rand(1, 9, 4),
    "beta": torch.rand(1, 9, 4),
    "use_qk_l2norm_in_kernel": True,
}
CHANNEL = DELTA | {"value": torch.randn(1, 9, 2, 8), "g": -torch.rand(1, 9, 2, 8), "beta": torch.rand(1, 9, 2)}
KNOWN: list[tuple[Callable[..., Any], tuple[int, ...], dict[str, Any]]] = [
    (modeling_mamba.causal_conv1d_fn, (1, 6, 9), CONV),
    (modeling_lfm3.causal_conv1d_fn, (1, 6, 9), CONV | {"activation": None, "bias": None}),
    (modeling_mamba.mamba_selective_scan, (1, 6, 9), SCAN),
    (modeling_zamba.mamba_selective_scan, (1, 6, 9), SCAN | {"z": None, "D": None}),
    (modeling_falcon_mamba.mamba_selective_scan, (1, 6, 9), SCAN | {"delta_bias": None, "delta_softplus": False}),
    (modeling_bamba.mamba2_chunk_scan, (1, 9, 4, 3), SSD),
    (modeling_bamba.mamba2_chunk_scan, (1, 9, 4, 3), SSD | {"D": torch.randn(4), "dt_bias": None}),
    (modeling_qwen3_next.torch_chunk_gated_delta_rule, (1, 9, 2, 8), DELTA),
    (modeling_qwen3_next.torch_chunk_gated_delta_rule, (1, 9, 2, 8), DELTA | {"use_qk_l2norm_in_kernel": False}),
    (modeling_kimi_linear.chunk_kimi_delta_attention, (1, 9, 2, 8), CHANNEL),
]


def _recogniser(function: Callable[..., Any]) -> Recogniser:
    interface = interface_of(function)
    assert interface is not None
    return Recogniser(function, interface)


def _first(result: Any) -> Tensor:
    output: Tensor = result[0] if isinstance(result, tuple) else result
    return output


@pytest.mark.parametrize(("function", "shape", "call"), KNOWN, ids=lambda value: getattr(value, "__name__", ""))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_known_by_numbers(
    function: Callable[..., Any], shape: tuple[int, ...], call: dict[str, Any], dtype: torch.dtype
) -> None:
    recogniser, x = _recogniser(function), torch.randn(shape).to(dtype)
    call = {k: v.to(dtype) if isinstance(v, Tensor) and k != "g" else v for k, v in call.items()}
    result, expected = _first(recogniser(x, **call)), _first(function(x, **call))
    assert list(recogniser.verdicts.values()) == [expected.dtype], "not taken for the op"
    tolerance = 5e-2 if dtype == torch.bfloat16 else 1e-4
    scale = float(expected.abs().max())
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance * scale)


def _late_conv(hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | None = None) -> Any:
    """Sees one token less than a causal convolution does."""
    shifted = F.pad(hidden_states, (1, 0))[..., :-1]
    return modeling_mamba.causal_conv1d_fn(shifted, weight, bias, activation)


def _forgetful_scan(hidden_states, dt, A, B, C, D, z, delta_bias, delta_softplus, **kwargs):  # type: ignore[no-untyped-def]
    half = dt.shape[-1] // 2
    parts = [(slice(None), slice(None), slice(None, half)), (slice(None), slice(None), slice(half, None))]
    outputs = [
        modeling_mamba.mamba_selective_scan(
            hidden_states[part], dt[part], A, B[part], C[part], D, z[part], delta_bias, delta_softplus
        )
        for part in parts
    ]
    return torch.cat(outputs, dim=-1)


@pytest.mark.parametrize(("function", "call"), [(_late_conv, CONV), (_forgetful_scan, SCAN)])
def test_near_misses_are_left_alone(function: Callable[..., Any], call: dict[str, Any]) -> None:
    recogniser, x = _recogniser(function), torch.randn(1, 6, 9)
    torch.testing.assert_close(recogniser(x, **call), function(x, **call), rtol=0, atol=0)
    assert list(recogniser.verdicts.values()) == [None]


def test_earlier_state_and_boundaries_are_never_dropped() -> None:
    function = modeling_bamba.mamba2_chunk_scan
    recogniser, x = _recogniser(function), torch.randn(1, 9, 4, 3)
    state = torch.randn(1, 4, 3, 5)
    result = recogniser(x, **SSD, initial_states=state)
    torch.testing.assert_close(result, function(x, **SSD, initial_states=state), rtol=0, atol=0)
    with pytest.raises(ValueError, match="packed sequences"):
        _recogniser(modeling_mamba.causal_conv1d_fn)(torch.randn(1, 6, 9), **CONV, seq_idx=torch.zeros(1, 9))
    assert not recogniser.verdicts


def test_an_activation_nobody_knows_reaches_the_function() -> None:
    recogniser, x = _recogniser(modeling_mamba.causal_conv1d_fn), torch.randn(1, 6, 9)
    call = CONV | {"activation": "tanh"}
    torch.testing.assert_close(recogniser(x, **call), modeling_mamba.causal_conv1d_fn(x, **call), rtol=0, atol=0)


def test_other_functions_are_no_candidates() -> None:
    assert interface_of(modeling_mamba.causal_conv1d_update) is None
    assert interface_of(modeling_mamba.mamba_selective_state_update) is None
    assert interface_of(modeling_mamba.mamba_inner_fn) is None
    assert interface_of(F.conv1d) is None and interface_of(lambda: None) is None


def test_namespaces_are_put_back() -> None:
    before = dict(vars(modeling_mamba))
    model = nn.Sequential(modeling_mamba.MambaRMSNorm(4))
    with mixers_recognised(model):
        assert isinstance(modeling_mamba.causal_conv1d_fn, Recogniser)
    assert vars(modeling_mamba) == before


def _reads_its_final_state(self: nn.Module, x: Tensor) -> Tensor:
    rest = {name: self.get_buffer(name) for name in ("A", "D")}
    z = x.transpose(1, 2)
    y, state = modeling_mamba.mamba_selective_scan(
        z, z, B=z[:, :5], C=z[:, :5], z=None, delta_softplus=True, return_last_state=self.asks, **rest
    )
    return y.transpose(1, 2) + state.sum()


def test_a_model_that_reads_the_final_state_itself_is_refused() -> None:
    model = Sketch(_reads_its_final_state, norm=modeling_mamba.MambaRMSNorm(4), A=-torch.rand(16, 5), D=torch.ones(16))
    model.asks = True  # type: ignore[assignment]
    graph = captured(model)
    assert counts(graph)["selective_scan"] == 1
    with pytest.raises(GraphLevelError, match="the state after the last token is read"):
        verify(graph, Level.CANONICAL)
