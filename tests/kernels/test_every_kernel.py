"""Every kernel in the op table is tested by being registered: against its op, with the op's samples and tolerances."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from autodeploy.compile.bind import kernel_operator
from autodeploy.compile.replay import Memory, record
from autodeploy.kernels import provider
from autodeploy.ops import OPS, Kernel, Op
from tests.ops.laws import Replay

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
PROVIDERS = {
    name for device in (CPU, CUDA) for name in (*provider.priority(device), *provider.invariant_priority(device))
}
"""Asked for, and with that registered: where there is no CUDA device, those for it run in an interpreter."""
NATIVE = provider.invariant_priority(CPU)
KERNELS = [(op, kernel) for op in OPS.values() for kernel in op.kernels.values()]
STATELESS = [(op, kernel) for op, kernel in KERNELS if op.samples is not None]
STATELESS_NATIVE = [(op, kernel) for op, kernel in STATELESS if kernel.provider in NATIVE]
CACHED = [(op, op.cached.kernels[name]) for op in OPS.values() if op.cached is not None for name in op.cached.kernels]
REPEATED = [(op, kernel) for op, kernel in CACHED if kernel.provider in provider.priority(CPU)]
"""Batch-invariant kernels may look at boundaries: steps with several tokens of a sequence are not repeated then."""
DTYPES = [torch.float32, torch.bfloat16]
UNKNOWN_DTYPES = [
    (op, kernel, dtype)
    for op, kernel in KERNELS
    for dtype in (torch.float16, torch.float64)
    if (kernel.provider in NATIVE or dtype != torch.float16) and op.name != "accept_drafts"  # of whole numbers alone
]
SCHEDULES = [(op, kernel, dtype, seed) for op, kernel in CACHED for dtype in DTYPES for seed in range(4)]


def is_slow(kernel: Kernel, dtype: torch.dtype, seed: int) -> bool:
    """An interpreter takes seconds for what native kernels do at once."""
    return kernel.provider not in NATIVE and (dtype, seed) != (torch.float32, 0)


def named(pairs: list[tuple[Op, Kernel]]) -> pytest.MarkDecorator:
    names = [f"{op.name}-{kernel.provider}" for op, kernel in pairs]
    return pytest.mark.parametrize(("op", "kernel"), pairs, ids=names)


def converted(sample: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """The sample in a model's dtype; what a sample has in other dtypes is stored so whatever the model's dtype."""

    def is_converted(value: object) -> bool:
        return isinstance(value, Tensor) and value.dtype in (torch.float32, torch.bfloat16)

    def of(value: object) -> object:
        if is_converted(value):
            assert isinstance(value, Tensor)
            return value.to(dtype)
        return dtype if value is torch.float32 else value

    return {name: of(value) for name, value in sample.items()}


def results(value: object) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else list(value)  # type: ignore[call-overload]


def test_every_kernel_is_covered() -> None:
    cached = {id(kernel) for _, kernel in CACHED}
    assert all(op.samples is not None or id(kernel) in cached for op, kernel in KERNELS)
    assert {op.name for op, _ in KERNELS} >= {"linear", "rms_norm", "add_rms_norm", "rope", "gated_activation"}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@named(STATELESS)
def test_equals_the_reference(op: Op, kernel: Kernel, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    assert op.samples is not None
    for sample in op.samples():
        arguments = converted(sample, dtype)
        assert kernel.supports(**arguments) is None
        before = {name: value.clone() for name, value in arguments.items() if isinstance(value, Tensor)}
        for mine, expected in zip(
            results(kernel.function(**arguments)), results(op.reference(**arguments)), strict=True
        ):
            torch.testing.assert_close(
                mine, expected, rtol=op.tolerance.get(dtype, 0.0), atol=op.tolerance.get(dtype, 0.0)
            )
        assert all(torch.equal(arguments[name], value) for name, value in before.items()), "an argument was changed"


@pytest.mark.parametrize(
    ("op", "kernel", "dtype"), UNKNOWN_DTYPES, ids=[f"{o.name}-{k.provider}-{d}" for o, k, d in UNKNOWN_DTYPES]
)
def test_refuses_what_it_was_not_compiled_for(op: Op, kernel: Kernel, dtype: torch.dtype) -> None:
    source = op if op.samples is not None else next(o for o in OPS.values() if o.cached is op)
    assert source.samples is not None
    arguments = converted(_with_states(source, op, source.samples()[0]), dtype)
    assert "float32, bfloat16" in (kernel.supports(**arguments) or "")


def _with_states(source: Op, op: Op, sample: dict[str, Any]) -> dict[str, Any]:
    if source is op:
        return sample
    assert source.states is not None
    int32 = torch.zeros(1, 1, dtype=torch.int32)
    batch = {"seq_lens": int32[0], "page_table": int32, "slot_mapping": torch.zeros(24, dtype=torch.int64)}
    states = {name: torch.zeros(1, 1, *spec.shape) for name, spec in source.states(**sample).items()}
    return {name: (sample | batch | {"state_slots": int32[0]} | states)[name] for name in op.parameters}


@pytest.mark.parametrize(
    ("op", "kernel", "dtype", "seed"),
    [
        pytest.param(
            *(op, kernel, dtype, seed),
            id=f"{op.name}-{kernel.provider}-{dtype}-{seed}",
            marks=[pytest.mark.slow] * is_slow(kernel, dtype, seed),
        )
        for op, kernel, dtype, seed in SCHEDULES
    ],
)
def test_keeps_the_law_of_cached_ops(op: Op, kernel: Kernel, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    assert op.cached is not None and op.samples is not None
    twin = dataclasses.replace(op.cached, overload=kernel.function)
    samples = [sample for sample in op.samples() if kernel.supports(**_with_states(op, op.cached, sample)) is None]
    assert len(samples) > len(op.samples()) // 2
    for sample in samples:
        arguments = converted(sample, dtype)
        result = Replay(dataclasses.replace(op, cached=twin), arguments, seed).run()
        # Both against float32, so that the reference's own rounding is not held against the kernel.
        expected = op.reference(**converted(arguments, torch.float32))
        tolerance = op.tolerance.get(dtype, 0.0)
        torch.testing.assert_close(result.float(), expected, rtol=tolerance, atol=tolerance)


def _repeated(function: Callable[..., Any]) -> Callable[..., Any]:
    """Calls a kernel, undoes what it did, and gives what repeating the call does."""

    def call(**arguments: Any) -> Tensor:
        names = [name for name, value in arguments.items() if isinstance(value, Tensor)]
        tensors = [arguments[name] for name in names]
        before = [value.clone() for value in tensors]
        step, _ = record(
            lambda *given: function(**arguments | dict(zip(names, given, strict=True))), (), tensors, Memory()
        )
        assert not step.obstacle
        for value, old in zip(tensors, before, strict=True):
            value.copy_(old)
        step.result.fill_(-1)
        step.tape.run()
        return step.result

    return call


@named(REPEATED)
def test_a_repeated_call_keeps_the_law(op: Op, kernel: Kernel) -> None:
    torch.manual_seed(0)
    assert op.cached is not None and op.samples is not None
    twin = dataclasses.replace(op.cached, overload=_repeated(kernel.function))
    for sample in op.samples()[:4]:
        if kernel.supports(**_with_states(op, op.cached, sample)) is None:
            result = Replay(dataclasses.replace(op, cached=twin), sample, 0).run()
            torch.testing.assert_close(result, op.reference(**sample), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@named(STATELESS_NATIVE)
def test_a_repeated_call_gives_the_same(op: Op, kernel: Kernel, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    assert op.samples is not None
    for sample in op.samples():
        arguments = converted(sample, dtype)
        names = [name for name, value in arguments.items() if isinstance(value, Tensor)]
        first: list[Tensor] = []
        step, _ = record(
            functools.partial(_call, kernel, arguments, names, first),
            (),
            [arguments[name] for name in names],
            Memory(),
        )
        expected = [value.clone() for value in first]
        for value in first:
            value.fill_(-1)
        step.tape.run()
        if step.obstacle:
            assert num_rows(sample) > 8, "few rows are what steps are repeated for"
            continue
        for again, once in zip(first, expected, strict=True):
            torch.testing.assert_close(again, once, rtol=0, atol=0)


def _call(kernel: Kernel, arguments: dict[str, Any], names: list[str], first: list[Tensor], *given: Tensor) -> Tensor:
    first[:] = results(kernel.function(**arguments | dict(zip(names, given, strict=True))))
    return first[0]


def num_rows(sample: dict[str, Any]) -> int:
    x: Tensor = next(value for value in sample.values() if isinstance(value, Tensor))
    return x.numel() // x.shape[-1]


@named(STATELESS)
def test_as_a_registered_operator(op: Op, kernel: Kernel) -> None:
    """What a compiled graph calls: the same result, and a fake of the same form."""
    torch.manual_seed(0)
    operator = kernel_operator(op, kernel.provider)
    assert operator is kernel_operator(op, kernel.provider)
    assert op.samples is not None
    for sample in op.samples()[:4]:
        real = results(operator(**sample))
        mode = torch._subclasses.FakeTensorMode()
        with mode:
            fakes = {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in sample.items()}
            faked = results(operator(**fakes))
        for mine, expected, fake in zip(real, results(kernel.function(**sample)), faked, strict=True):
            torch.testing.assert_close(mine, expected, rtol=0, atol=0)
            assert (fake.shape, fake.dtype, fake.stride()) == (mine.shape, mine.dtype, mine.stride())


def test_every_provider_of_a_kernel_is_on_a_priority_list() -> None:
    assert {kernel.provider for _, kernel in KERNELS} <= PROVIDERS | {"narrow"}  # made up in tests of the lower stage
