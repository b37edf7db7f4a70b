"""Every Triton kernel on CUDA against its op on the CPU: the op's samples and tolerances, and the law of cached ops.

Run it with `make test-gpu`. It skips, and says so, where there is no CUDA device; `tests/kernels` runs the same kernels
there, in an interpreter.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from autodeploy.kernels import provider, triton
from autodeploy.ops import OPS, Op
from tests.kernels.test_every_kernel import converted, results
from tests.ops.laws import Replay

CUDA = torch.device("cuda")
assert triton.PROVIDER in provider.priority(CUDA)  # which registers kernels, where they can be used
ELSEWHERE = ("choose_tokens",)
"""test_sampling.py: a random number may fall between two roundings."""
STATELESS = [
    (op, dtype)
    for op in OPS.values()
    for dtype in op.tolerance or (torch.float32,)
    if op.samples is not None and triton.PROVIDER in op.kernels and op.name not in ELSEWHERE
]
CACHED = [
    (op, dtype)
    for op in OPS.values()
    for dtype in op.tolerance
    if op.cached is not None and triton.PROVIDER in op.cached.kernels
]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: nothing of this file was tested here"),
]


class Refused(Exception):
    """The kernel does not take these arguments on this device."""


def named(pairs: list[tuple[Op, torch.dtype]]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(("op", "dtype"), pairs, ids=[f"{op.name}-{dtype}" for op, dtype in pairs])


def moved(value: Any, device: torch.device | str) -> Any:
    if isinstance(value, dict):
        return {name: moved(part, device) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [moved(part, device) for part in value]
    return value.to(device) if isinstance(value, Tensor) else value


def run_there(op: Op, arguments: dict[str, Any]) -> list[Tensor]:
    """The op's kernel on the device, for arguments on the CPU; what it changes is changed here."""
    kernel, there = op.kernels[triton.PROVIDER], moved(arguments, CUDA)
    reason = kernel.supports(**there)
    if reason is not None:
        raise Refused(reason)
    found: list[Tensor] = moved(results(kernel.function(**there)), "cpu")
    for name in op.mutates:
        arguments[name].copy_(there[name])
    return found


def over_samples(op: Op, run: Callable[[dict[str, Any]], None]) -> None:
    """Run each sample that the kernel takes: most of them, or none, as on devices without 8-bit floating point."""
    assert op.samples is not None
    refused = []
    samples = op.samples()
    for sample in samples:
        try:
            run(sample)
        except Refused as why:
            refused.append(str(why))
    if len(refused) == len(samples):
        pytest.skip(refused[0])
    assert len(refused) < len(samples) / 2, refused


@named(STATELESS)
def test_equals_the_reference(op: Op, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    tolerance = op.tolerance.get(dtype, 0.0)

    def run(sample: dict[str, Any]) -> None:
        arguments = converted(sample, dtype)
        for mine, expected in zip(run_there(op, arguments), results(op.reference(**arguments)), strict=True):
            torch.testing.assert_close(mine, expected, rtol=tolerance, atol=tolerance)

    over_samples(op, run)


@pytest.mark.usefixtures("tuning")
@named([pair for pair in STATELESS if pair[1] == torch.bfloat16])
def test_equals_the_reference_in_the_fastest_configuration(op: Op, dtype: torch.dtype) -> None:
    """Also the second time, when the choice is known. All the configurations give what the op says without a device."""
    torch.manual_seed(0)
    assert op.samples is not None
    arguments, tolerance = converted(op.samples()[-1], dtype), op.tolerance[dtype]
    expected = results(op.reference(**arguments))
    for _ in range(2):
        try:
            found = run_there(op, arguments)
        except Refused as why:
            pytest.skip(str(why))
        for mine, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


def keeps_the_law(op: Op, sample: dict[str, Any], dtype: torch.dtype, seed: int) -> None:
    """Raises AssertionError where the op's cached twin does not give what the op gives."""
    cached, tolerance = op.cached, op.tolerance[dtype]
    assert cached is not None
    twin = dataclasses.replace(cached, overload=lambda **arguments: run_there(cached, arguments)[0])
    arguments = converted(sample, dtype)
    result = Replay(dataclasses.replace(op, cached=twin), arguments, seed).run()
    expected = op.reference(**converted(arguments, torch.float32))
    torch.testing.assert_close(result.float(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("seed", range(3))
@named(CACHED)
def test_keeps_the_law_of_cached_ops(op: Op, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    over_samples(op, lambda sample: keeps_the_law(op, sample, dtype, seed))


@pytest.mark.usefixtures("tuning")
@pytest.mark.parametrize("name", ["causal_conv", "delta_rule", "ssd"])
def test_measuring_moves_no_state_on(name: str) -> None:
    torch.manual_seed(0)
    samples = OPS[name].samples
    assert samples is not None
    keeps_the_law(OPS[name], samples()[0], torch.bfloat16, seed=0)
