"""Norms, rope and gated activations: any width, strided rows, rounding order, infinities and NaN."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from autodeploy.kernels.cpu.mlp import gated_activation_cpu
from autodeploy.kernels.cpu.norm import add_rms_norm_cpu, gated_rms_norm_cpu, layer_norm_cpu, rms_norm_cpu
from autodeploy.kernels.cpu.rope import rope_cpu
from autodeploy.ops import add_rms_norm, gated_activation, gated_rms_norm, layer_norm, rms_norm, rope
from autodeploy.ops.mlp import ACTIVATIONS

INF, NAN = float("inf"), float("nan")
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])
# bfloat16 keeps 8 bits; the kernels round once where the reference may round three times.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def close(mine: Tensor, expected: Tensor) -> None:
    tolerance = TOLERANCE[mine.dtype]
    torch.testing.assert_close(mine, expected, rtol=tolerance, atol=tolerance, equal_nan=True)


@given(
    rows=st.integers(0, 40),
    width=st.integers(1, 300),
    has_weight=st.booleans(),
    offset=st.sampled_from([0.0, 1.0]),
    in_float32=st.booleans(),
    dtype=DTYPES,
)
def test_rms_norm_and_with_residual(
    rows: int, width: int, has_weight: bool, offset: float, in_float32: bool, dtype: torch.dtype
) -> None:
    x, residual = torch.randn(1, rows, width).to(dtype), torch.randn(1, rows, width).to(dtype)
    facts = (torch.randn(width).to(dtype) if has_weight else None, 1e-6, offset, in_float32)
    close(rms_norm_cpu(x, *facts), rms_norm.reference(x, *facts))
    normed, total = add_rms_norm_cpu(x, residual, *facts)
    assert torch.equal(total, x + residual)
    close(normed, add_rms_norm.reference(x, residual, *facts)[0])


@given(
    rows=st.integers(0, 40),
    width=st.integers(1, 300),
    has_weight=st.booleans(),
    has_bias=st.booleans(),
    shift=st.sampled_from([0.0, 20.0]),
    dtype=DTYPES,
)
def test_layer_norm(rows: int, width: int, has_weight: bool, has_bias: bool, shift: float, dtype: torch.dtype) -> None:
    x = (torch.randn(1, rows, width) + shift).to(dtype)
    weight, bias = (torch.randn(width).to(dtype) if has else None for has in (has_weight, has_bias))
    mine, expected = layer_norm_cpu(x, weight, bias, 1e-5), layer_norm.reference(x, weight, bias, 1e-5)
    tolerance = {torch.float32: 2e-4, torch.bfloat16: 3e-2}[dtype]  # a mean of 20 costs bits of what is left
    torch.testing.assert_close(mine, expected, rtol=tolerance, atol=tolerance)


def test_rounding_order_is_the_references() -> None:
    """In bfloat16 the two orders differ in some elements; each kernel follows its own."""
    torch.manual_seed(0)
    x, weight = torch.randn(64, 256).bfloat16(), torch.randn(256).bfloat16()
    results = [rms_norm_cpu(x, weight, 1e-6, 1.0, order) for order in (True, False)]
    assert not torch.equal(*results)
    for order, result in zip((True, False), results, strict=True):
        same = (result == rms_norm.reference(x, weight, 1e-6, 1.0, order)).float().mean()
        assert same > 0.999


@pytest.mark.parametrize("tokens", [1, 7])
def test_rms_norm_of_columns_where_they_are(tokens: int) -> None:
    """Heads of a fused projection, as norms of queries and keys see them."""
    row = torch.randn(1, tokens, 96)
    heads = row[..., 16:80].view(1, tokens, 4, 16)
    close(rms_norm_cpu(heads, None, 1e-6, 0.0, False), rms_norm.reference(heads, None, 1e-6, 0.0, False))
    spread = torch.randn(32)[::2]
    close(rms_norm_cpu(heads, spread, 1e-6, 0.0, True), rms_norm.reference(heads, spread, 1e-6, 0.0, True))
    odd = row.view(tokens, 2, 3, 16).transpose(0, 1)[..., ::2]  # nothing the kernel reads in place
    close(rms_norm_cpu(odd, None, 1e-6, 0.0, False), rms_norm.reference(odd, None, 1e-6, 0.0, False))


@given(
    tokens=st.integers(0, 20), groups=st.integers(1, 3), width=st.integers(1, 100), apart=st.booleans(), dtype=DTYPES
)
def test_gated_rms_norm_of_columns_where_they_are(
    tokens: int, groups: int, width: int, apart: bool, dtype: torch.dtype
) -> None:
    size = groups * width
    x, row = torch.randn(1, tokens, size).to(dtype), torch.randn(1, tokens, 2 * size + 3).to(dtype)
    gate = row[..., 1 : 1 + 2 * size : 2] if apart else row[..., 1 : 1 + size]
    facts = (torch.randn(size).to(dtype), 1e-6, "silu", groups, True, True)
    close(gated_rms_norm_cpu(x, gate, *facts), gated_rms_norm.reference(x, gate, *facts))
    for one, rows in ((x[0], gate[0]), (x[0, :1].flatten(), gate[0, :1].flatten()), (x[None], gate[None])):
        if tokens:
            close(gated_rms_norm_cpu(one, rows, *facts), gated_rms_norm.reference(one, rows, *facts))
    both, gates = x.expand(2, -1, -1), torch.stack((row, -row), 2)[..., :size].movedim(2, 0).flatten(0, 1)
    close(gated_rms_norm_cpu(both, gates, *facts), gated_rms_norm.reference(both, gates, *facts))


def test_norms_of_infinities_nan_and_zero() -> None:
    x = torch.zeros(4, 20)
    x[1, 3], x[2, 19], x[3] = INF, NAN, 1e-30
    close(rms_norm_cpu(x, None, 1e-6, 0.0, False), rms_norm.reference(x, None, 1e-6, 0.0, False))


def test_add_rms_norm_refuses_shapes_that_broadcast() -> None:
    supports = add_rms_norm.kernels["cpu"].supports
    facts = {"weight": None, "eps": 1e-6, "weight_offset": 0.0, "scale_in_float32": False}
    assert supports(x=torch.ones(1, 3, 8), residual=torch.ones(1, 3, 8), **facts) is None
    assert "shape" in (supports(x=torch.ones(1, 3, 8), residual=torch.ones(8), **facts) or "")
    assert "shape" in (supports(x=torch.ones(1, 3, 8), residual=torch.ones(1, 1, 8), **facts) or "")


@given(
    tokens=st.integers(1, 20),
    kv_heads=st.integers(1, 3),
    groups=st.integers(1, 3),
    half=st.integers(1, 40),
    rest=st.integers(0, 20),
    dtype=DTYPES,
)
def test_rope(tokens: int, kv_heads: int, groups: int, half: int, rest: int, dtype: torch.dtype) -> None:
    width, heads = 2 * half + rest, kv_heads * groups
    row = torch.randn(1, tokens, (heads + 2 * kv_heads) * width).to(dtype)
    query = row[..., : heads * width].view(1, tokens, heads, width)
    key = row[..., heads * width :][..., : kv_heads * width].view(1, tokens, kv_heads, width)
    angle = torch.randn(1, tokens, 2 * half)
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    for mine, expected in zip(rope_cpu(query, key, cos, sin), rope.reference(query, key, cos, sin), strict=True):
        torch.testing.assert_close(mine, expected, rtol=TOLERANCE[dtype], atol=4 * TOLERANCE[dtype])


def test_rope_of_heads_last_to_first() -> None:
    query, key = torch.randn(1, 3, 16, 4).transpose(2, 3), torch.randn(1, 3, 16, 2).transpose(2, 3)
    cos, sin = torch.randn(1, 1, 16).expand(1, 3, 16), torch.randn(1, 3, 16)
    for mine, expected in zip(rope_cpu(query, key, cos, sin), rope.reference(query, key, cos, sin), strict=True):
        close(mine, expected)


@pytest.mark.parametrize(("rows", "rotary"), [(2, 8), (1, 7), (1, 20)])
def test_rope_refuses_what_it_cannot_turn(rows: int, rotary: int) -> None:
    angle = torch.ones(1, 5, rotary)
    arguments = {"query": torch.ones(rows, 5, 4, 16), "key": torch.ones(rows, 5, 2, 16), "cos": angle, "sin": angle}
    assert rope.kernels["cpu"].supports(**arguments) is not None


@given(rows=st.integers(0, 9), width=st.integers(1, 600), name=st.sampled_from(list(ACTIVATIONS)), dtype=DTYPES)
def test_gated_activation(rows: int, width: int, name: str, dtype: torch.dtype) -> None:
    gate_up = (4 * torch.randn(1, rows, 2 * width)).to(dtype)
    close(gated_activation_cpu(gate_up, name), gated_activation.reference(gate_up, name))


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_over_their_whole_range(name: str) -> None:
    special = [INF, -INF, NAN, 0.0, -0.0, 1e-38, -1e-38, 88.7, -88.7, 89.0, -89.0, 1e20, -1e20]
    gate = torch.cat((torch.tensor(special), torch.linspace(-120, 120, 4001)))
    gate_up = torch.cat((gate, torch.ones_like(gate)))[None]
    expected = gated_activation.reference(gate_up, name)
    if name == "gelu":
        expected[0, 0] = INF  # what it is; torch's vectorised form has a NaN there
    close(gated_activation_cpu(gate_up, name), expected)


def test_an_unknown_activation_is_refused() -> None:
    supports = gated_activation.kernels["cpu"].supports
    assert "mish" in (supports(gate_up=torch.ones(1, 4), activation="mish") or "")
