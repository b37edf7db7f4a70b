"""Rows: seconds and limits of calls alike are added up, and held to the rates of the machine by hand."""

import io

import pytest
from rich.console import Console

from autodeploy.bench.machine import MachineLimits
from autodeploy.bench.profile.op_by_op import Call
from autodeploy.bench.profile.table import Phase, Row, make_rows, show
from autodeploy.bench.profile.timeline import Timeline
from autodeploy.bench.profile.trace import Coverage
from autodeploy.debug.costs import Cost, Step
from autodeploy.graph.report import BuildReport

LIMITS = MachineLimits(
    device="cuda", dtype="bfloat16", threads=1, memory_gb_per_second=1.0, matmul_gflop_per_second=10.0, matmul_size=64
)
CALLS = [
    Call("linear", "linear", "triton", "8x4", Cost(weight_bytes=2_000_000, flops_per_token=1_000_000)),
    Call("linear_1", "linear", "triton", "8x4", Cost(weight_bytes=2_000_000, flops_per_token=1_000_000)),
    Call("linear_2", "linear", "triton", "16x4", Cost(weight_bytes=1_000_000, flops_per_token=30_000_000)),
    Call("view", "view", "torch", "", Cost()),
]
SECONDS = {"linear": 0.004, "linear_1": 0.006, "linear_2": 0.009, "view": 0.001}


def test_rows_against_the_limits() -> None:
    rows = make_rows(CALLS, SECONDS, Step.decode(2, 100), LIMITS)
    wide, narrow, view = sorted(rows, key=lambda row: row.weights, reverse=True)
    # 2 MB at 1 GB/s take 2 ms each; 2 x 1 MFLOP at 10 GFLOP/s only 0.2 ms.
    assert (wide.calls, wide.limited_by) == (2, "memory")
    assert (wide.seconds, wide.share, wide.limit_seconds, wide.limit_share) == pytest.approx((0.010, 0.5, 0.004, 0.4))
    # 2 x 30 MFLOP take 6 ms, its 1 MB only 1 ms.
    assert (narrow.limited_by, narrow.limit_seconds) == ("operations", pytest.approx(0.006))
    assert (view.limited_by, view.limit_seconds, view.limit_share) == ("", 0.0, 0.0)
    assert [row.seconds for row in rows] == sorted((row.seconds for row in rows), reverse=True)
    assert sum(row.share for row in rows) == pytest.approx(1)


def test_what_launched_nothing_has_no_share_of_a_limit() -> None:
    (row,) = make_rows(CALLS[3:], {"view": 0.0}, Step.decode(1, 1), LIMITS)
    assert row == Row(
        op="view", provider="torch", weights="", calls=1, seconds=0.0, share=0.0, limit_seconds=0.0, limited_by="",
        limit_share=None,
    )  # fmt: skip


@pytest.mark.parametrize("on_device", [True, False])
def test_text(on_device: bool) -> None:
    rows = make_rows(CALLS, SECONDS, Step.decode(2, 100), LIMITS)
    phase = Phase(
        name="decode",
        step=Step.decode(2, 100),
        served_seconds=0.025,
        ops_seconds=0.02,
        limit_seconds=0.01,
        rows=rows,
        timeline=Timeline(steps=8, seconds=0.4, busy_seconds=0.16, within_seconds=0.2, between_seconds=0.04),
        on_device=on_device,
        coverage=Coverage(steps=8, covered_steps=6, unit="kernels", counted=80, covered=60),
    )
    text = io.StringIO()
    graphs = {"text": {"not_captured": {"in pieces": "out of memory"}}}
    report = BuildReport(facts={"compile_backend": "torch-cudagraph", "cuda_graphs": graphs})
    show([phase], LIMITS, report, Console(file=text, width=300))
    said = text.getvalue()
    assert "decode: 2 tokens of 2 sequences, context 100" in said
    assert "linear │ triton   │ 8x4     │ 2     │ 10.000 │ 50.0% │     4.000 │      40% │ memory" in said
    assert "(torch-cudagraph): 25.000 ms" in said and "10.000 ms, 40% of the served step" in said
    assert "graphs: 6 of 8 steps, 60 of 80 kernels in them" in said
    assert "no graphs of steps in pieces: out of memory" in said and "replay" not in said
    if on_device:
        assert "10.0% idle between steps, 50.0% within them" in said
        assert "20.000 of 25.000 ms busy: 20.0% idle" in said
    else:
        assert "10.0% outside the model" in said and "idle" not in said
