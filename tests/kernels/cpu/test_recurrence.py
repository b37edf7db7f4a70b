"""Native recurrences beyond the ops' samples: views as a model makes them, threads, and batch inputs that are wrong."""

from typing import Any

import pytest
import torch
from torch import Tensor

from autodeploy.compile.replay import Memory, record
from autodeploy.kernels.cpu import matrix_memory, recurrence
from autodeploy.ops import OPS, Op

BOUNDARIES = torch.tensor([0, 3, 4, 11], dtype=torch.int32)
SLOTS = torch.tensor([2, 4, 1], dtype=torch.int32)


def _pieces(dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Per-token tensors that are columns of one wide projection, as split and view leave them."""
    widths = [torch.Size(shape).numel() for shape in shapes]
    wide = torch.randn(1, 11, sum(widths)).to(dtype)
    return [part.unflatten(-1, shape) for part, shape in zip(wide.split(widths, dim=-1), shapes, strict=True)]


def _calls(dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    torch.manual_seed(0)
    (x,) = _pieces(dtype, (70,))
    u, dt, z, b, c = _pieces(dtype, (70,), (70,), (70,), (16,), (16,))
    y, B, C = _pieces(dtype, (8, 20), (2, 40), (2, 40))
    query, key, value = _pieces(dtype, (2, 40), (2, 40), (4, 36))
    softplus = {"dt_bias": torch.randn(70), "dt_softplus": True}
    limits = {"dt_bias": torch.randn(8), "dt_softplus": True, "dt_min": 0.1, "dt_max": None}
    return {
        "cached_causal_conv": {"x": x, "weight": torch.randn(70, 4).to(dtype), "bias": None, "activation": "silu"},
        "cached_selective_scan": {"x": u, "dt": dt, "A": -torch.rand(70, 16), "B": b, "C": c, "D": None, "z": z}
        | softplus,
        "cached_ssd": {"x": y, "dt": torch.randn(1, 11, 8), "A": -torch.rand(8), "B": B, "C": C, "D": torch.randn(8)}
        | limits,
        "cached_delta_rule": {"query": query, "key": key, "value": value, "beta": torch.rand(1, 11, 4).to(dtype)}
        | {"decay": -torch.rand(1, 11, 4, 40), "scale": 0.2, "norm_eps": 1e-6},
    } | _linear_calls(dtype)


def _linear_calls(dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    x, gate = _pieces(dtype, (70,), (70,))
    query, key, value = _pieces(dtype, (4, 40), (4, 40), (4, 36))
    read, write = (part / 10 for part in _pieces(dtype, (4, 40), (4, 40)))
    mixed = {"query": query, "key": key, "value": value}
    return {
        "cached_linear_recurrence": {"x": x, "gate": gate},
        "cached_wkv": {"key": x, "value": gate, "decay": -torch.rand(70), "bonus": torch.randn(70)},
        "cached_linear_attention": mixed | {"decay": -torch.rand(1, 11, 4, 40), "bonus": torch.randn(4, 40)},
        "cached_generalized_delta_rule": mixed | {"read": read, "write": write, "decay": -torch.rand(1, 11, 4, 40)},
    }


def _state(op: Op, call: dict[str, Any]) -> dict[str, Tensor]:
    """States that earlier tokens have left, in five slots."""
    source = next(other for other in OPS.values() if other.cached is op)
    assert source.states is not None
    specs = source.states(**call)
    return {name: torch.randn(5, *spec.shape).to(spec.dtype) / 4 for name, spec in specs.items()}


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", _calls(torch.float32))
def test_views_and_threads(name: str, dtype: torch.dtype, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (recurrence, matrix_memory):
        monkeypatch.setattr(module, "num_threads", lambda work, least: threads)
    op, call = OPS[name], _calls(dtype)[name]
    state = _state(op, call)
    arguments = call | {"cu_seqlens": BOUNDARIES, "state_slots": SLOTS}
    mine, expected = ({key: value.clone() for key, value in state.items()} for _ in range(2))
    result = op.kernels["cpu"].function(**arguments, **mine)
    tolerance = {"rtol": op.tolerance[dtype], "atol": op.tolerance[dtype]}
    torch.testing.assert_close(result, op.reference(**arguments, **expected), **tolerance)
    for key, value in mine.items():
        torch.testing.assert_close(value, expected[key], **tolerance)
        assert torch.equal(value[[0, 3]], state[key][[0, 3]]), "a slot of nobody's was written"


def _long_calls(dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """Sequences longer than what a kernel takes at once, rows that fill its blocks and some that do not."""
    torch.manual_seed(0)
    x = torch.randn(1, 83, 150).to(dtype)
    y, B, C = (torch.randn(1, 83, *shape).to(dtype) for shape in ((4, 37), (2, 128), (2, 128)))
    facts = {"A": -torch.rand(4) * 4, "D": None, "dt_bias": None, "dt_softplus": True, "dt_min": 0.0, "dt_max": None}
    convolutions = {
        f"cached_causal_conv of {taps}": {"x": x, "weight": torch.randn(150, taps).to(dtype)}
        | {"bias": torch.randn(150).to(dtype), "activation": "silu" if taps % 2 else None}
        for taps in (1, 2, 4, 7)
    }
    return convolutions | {"cached_ssd": {"x": y, "dt": torch.randn(1, 83, 4).to(dtype), "B": B, "C": C} | facts}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", _long_calls(torch.float32))
def test_long_sequences(name: str, dtype: torch.dtype) -> None:
    op, call = OPS[name.split(" ")[0]], _long_calls(dtype)[name]
    state = _state(op, call)
    arguments = call | {"cu_seqlens": torch.tensor([0, 2, 83], dtype=torch.int32), "state_slots": SLOTS[:2]}
    mine, expected = ({key: value.clone() for key, value in state.items()} for _ in range(2))
    tolerance = {"rtol": op.tolerance[dtype], "atol": op.tolerance[dtype]}
    result = op.kernels["cpu"].function(**arguments, **mine)
    torch.testing.assert_close(result, op.reference(**arguments, **expected), **tolerance)
    for key, value in mine.items():
        torch.testing.assert_close(value, expected[key], **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", _calls(torch.float32))
def test_a_repeated_step_makes_one_native_call(name: str, dtype: torch.dtype) -> None:
    """Parameters and inputs of either dtype are read as they are, columns of a projection where they are."""
    op, call = OPS[name], _calls(dtype)[name]
    arguments = call | {"cu_seqlens": BOUNDARIES, "state_slots": SLOTS} | _state(op, call)
    step, _ = record(lambda: op.kernels["cpu"].function(**arguments), (), (), Memory())
    assert (step.tape.num_native, step.tape.num_python) == (1, 0)


@pytest.mark.parametrize("name", _calls(torch.float32))
@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ({"state_slots": torch.tensor([2, 5, 1], dtype=torch.int32)}, "outside the states"),
        ({"state_slots": torch.tensor([2, -1, 1], dtype=torch.int32)}, "outside the states"),
        ({"state_slots": torch.tensor([2, 4], dtype=torch.int32)}, "do not fit"),
        ({"cu_seqlens": torch.tensor([0, 3, 4, 12], dtype=torch.int32)}, "do not fit"),
        ({"cu_seqlens": torch.tensor([0, 5, 4, 11], dtype=torch.int32)}, "do not fit"),
    ],
)
def test_contradictions_are_refused_before_anything_is_written(name: str, fault: dict[str, Tensor], says: str) -> None:
    op, call = OPS[name], _calls(torch.float32)[name]
    state = _state(op, call)
    before = {key: value.clone() for key, value in state.items()}
    with pytest.raises(IndexError, match=says):
        op.kernels["cpu"].function(**call, **({"cu_seqlens": BOUNDARIES, "state_slots": SLOTS} | fault), **state)
    assert all(torch.equal(value, before[key]) for key, value in state.items())


def test_a_convolution_over_the_whole_range_of_its_activation() -> None:
    special = [float("inf"), float("nan"), 0.0, -0.0, 1e-38, -1e-38, 88.7, -87.0, -89.0, -200.0, 1e20, -1e20]
    x = torch.cat((torch.tensor(special), torch.linspace(-120, 120, 4001)))[None, None]
    call = {"x": x, "weight": torch.ones(x.shape[2], 1), "bias": None, "activation": "silu"}
    arguments = call | {"cu_seqlens": torch.tensor([0, 1], dtype=torch.int32), "state_slots": SLOTS[:1]}
    result, expected = (
        function(**arguments, window=torch.zeros(5, 0, x.shape[2]))
        for function in (OPS["cached_causal_conv"].kernels["cpu"].function, OPS["cached_causal_conv"].reference)
    )
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-30, equal_nan=True)


def test_what_is_not_written_in_it_is_refused_with_the_reason() -> None:
    op, call = OPS["cached_causal_conv"], _calls(torch.float32)["cached_causal_conv"]
    arguments = call | {"cu_seqlens": BOUNDARIES, "state_slots": SLOTS} | _state(op, call)
    supports = op.kernels["cpu"].supports
    assert supports(**arguments) is None
    assert "'gelu'" in (supports(**(arguments | {"activation": "gelu"})) or "")
    assert "torch.int64" in (supports(**(arguments | {"state_slots": SLOTS.long()})) or "")
