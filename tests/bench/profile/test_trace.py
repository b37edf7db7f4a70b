"""Trace: device work goes to the range that launched it, whenever it ran; coverage counts what graphs launched.

The events are as torch 2.11 writes them for a CUDA device: a kernel and the call that launched it share a correlation
number, and so do all kernels of a graph and its launch.
"""

from typing import Any

import pytest

from autodeploy.bench.profile.timeline import timeline
from autodeploy.bench.profile.trace import Coverage, coverage, parse_trace

HOST, OTHER, STREAM = 100, 101, 7


def _event(category: str, name: str, begin: float, length: float, thread: int = HOST, **args: Any) -> dict[str, Any]:
    return {"ph": "X", "cat": category, "name": name, "ts": begin, "dur": length, "tid": thread, "args": args}


EVENTS = [
    {"ph": "M", "name": "process_name", "args": {"name": "python"}},
    _event("user_annotation", "step", 0, 100),
    _event("gpu_user_annotation", "step", 200, 90, STREAM),
    _event("cuda_runtime", "cudaLaunchKernel", 10, 2, correlation=1),
    _event("cuda_driver", "cuLaunchKernel", 20, 2, correlation=2),
    _event("cuda_runtime", "cudaMemcpyAsync", 30, 2, OTHER, correlation=3),  # within the range, on another thread
    _event("kernel", "gemm", 200, 40, STREAM, correlation=1),
    _event("kernel", "triton_norm", 250, 40, STREAM, correlation=2),
    _event("gpu_memcpy", "Memcpy HtoD", 295, 5, STREAM, correlation=3),
    _event("user_annotation", "step", 110, 50),
    _event("cuda_runtime", "cudaGraphLaunch", 120, 10, correlation=4),
    _event("kernel", "gemm", 300, 50, STREAM, correlation=4),
    _event("kernel", "triton_norm", 360, 40, STREAM, correlation=4),
    _event("cuda_runtime", "cudaLaunchKernel", 165, 2, correlation=5),
    _event("kernel", "argmax", 405, 5, STREAM, correlation=5),  # launched between the steps' ranges
    _event("kernel", "unknown", 420, 5, STREAM, correlation=99),
]


def test_work_goes_to_the_step_that_launched_it() -> None:
    trace = parse_trace(EVENTS)
    steps = trace.named("step")
    assert [step.begin for step in steps] == pytest.approx([0, 110e-6])
    assert [step.end for step in steps] == pytest.approx([100e-6, 160e-6])
    owners = [(work.name, owner) for owner, work in trace.launched_in(steps)]
    assert owners == [
        ("gemm", 0), ("triton_norm", 0), ("Memcpy HtoD", None), ("gemm", 1), ("triton_norm", 1), ("argmax", None),
        ("unknown", None),
    ]  # fmt: skip
    assert trace.device_seconds(["step", "absent"]) == {"step": pytest.approx([80e-6, 90e-6])}


def test_a_launch_that_was_not_recorded() -> None:
    """The kernel tells the operator in which it was made."""
    events = [
        {**_event("user_annotation", "step", 0, 10), "args": {"External id": 1}},
        {**_event("cpu_op", "aten::mm", 2, 5), "args": {"External id": 2}},
        {**_event("kernel", "gemm", 20, 5, STREAM), "args": {"External id": 2, "correlation": 9}},
        {**_event("kernel", "norm", 30, 3, STREAM), "args": {"External id": 1, "correlation": 10}},
        {**_event("kernel", "lost", 40, 3, STREAM), "args": {"correlation": 11}},
    ]
    trace = parse_trace(events)
    assert [owner for owner, _ in trace.launched_in(trace.named("step"))] == [0, 0, None]


def test_gaps_on_the_device() -> None:
    trace = parse_trace(EVENTS)
    found = timeline(trace.device_spans(trace.named("step")))
    assert found is not None
    assert (found.seconds, found.busy_seconds) == pytest.approx((200e-6, 175e-6))
    assert (found.within_seconds, found.between_seconds) == pytest.approx((20e-6, 5e-6))


def test_coverage_counts_kernels_that_graphs_launched() -> None:
    trace = parse_trace(EVENTS)
    expected = Coverage(steps=2, covered_steps=1, unit="kernels", counted=4, covered=2)
    assert coverage(trace, trace.named("step")) == expected


def test_coverage_counts_calls_of_repeated_steps() -> None:
    steps = [_event("user_annotation", "step", begin, 10) for begin in (0, 20, 40)]
    repeats = [_event("user_annotation", "replay: 30 native calls, 2 others", begin, 5) for begin in (21, 41, 60)]
    trace = parse_trace(steps + repeats)
    # The last one is of no step; one step was not repeated, so that how many calls it made does not show.
    expected = Coverage(steps=3, covered_steps=2, unit="calls", counted=None, covered=60)
    assert coverage(trace, trace.named("step")) == expected
    expected = Coverage(steps=2, covered_steps=2, unit="calls", counted=64, covered=60)
    assert coverage(trace, trace.named("step")[1:]) == expected
