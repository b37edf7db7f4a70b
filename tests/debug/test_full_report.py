"""The rules of a full check's verdict, its table and its JSON."""

import io
import json
import math
from typing import Any

import pytest
from rich.console import Console

from autodeploy.debug.agreement import Agreement
from autodeploy.debug.check_report import CheckReport, CheckRow
from autodeploy.debug.full_report import FullReport, Perplexity, PromptResult
from autodeploy.debug.full_table import print_full_check
from autodeploy.debug.report_json import report_json


def _run(**changes: Any) -> Agreement:
    values: dict[str, Any] = {
        "num_equal_tokens": 8,
        "first_margin": None,
        "num_positions": 20,
        "num_same_choice": 19,
        "worst_margin": 0.0,
        "kl_mean": 1e-7,
        "kl_max": 1e-6,
        "largest_error": 0.1,
        "largest_logit": 20.0,
    }
    return Agreement(**values | changes)


def _report(ours: Agreement, theirs: Agreement | None, dtype: str, perplexity: float = 10.0) -> FullReport:
    prompt = PromptResult(
        prompt="The capital\nof " + "France " * 20,
        num_prompt_tokens=5,
        token_ids=[1] * 8,
        ours=ours,
        transformers=theirs,
    )
    rounded = None if theirs is None else 10.02
    text = Perplexity(source="a text", num_tokens=9, window=8, reference=10.0, ours=perplexity, transformers=rounded)
    return FullReport({"model": "m", "dtype": dtype}, [prompt], text)


@pytest.mark.parametrize(
    ("changes", "perplexity", "passes"),
    [
        ({}, 10.0, True),
        ({"worst_margin": 0.019}, 10.0, True),
        ({"worst_margin": 0.021}, 10.0, False),
        ({"kl_mean": 0.9e-5}, 10.0, True),
        ({"kl_mean": 1.1e-5}, 10.0, False),
        ({"kl_mean": math.nan, "worst_margin": math.nan}, 10.0, False),
        ({}, 10.009, True),
        ({}, 9.989, False),
        ({}, math.nan, False),
    ],
)
def test_in_float32_only_ties_may_differ(changes: dict[str, Any], perplexity: float, passes: bool) -> None:
    assert _report(_run(**changes), None, "float32", perplexity).passed is passes


@pytest.mark.parametrize(
    ("ours", "theirs", "passes"),
    [
        ({"kl_mean": 1.9e-3}, {"kl_mean": 1e-3}, True),
        ({"kl_mean": 2.1e-3}, {"kl_mean": 1e-3}, False),
        ({"worst_margin": 0.63}, {}, True),  # twice a tie: 1.6 % of the largest logit
        ({"worst_margin": 0.65}, {}, False),
        ({"worst_margin": 0.99}, {"worst_margin": 0.5}, True),
        ({"worst_margin": 1.01}, {"worst_margin": 0.5}, False),
    ],
)
def test_in_bfloat16_rounding_of_transformers_is_the_measure(
    ours: dict[str, float], theirs: dict[str, float], passes: bool
) -> None:
    assert _report(_run(**ours), _run(**theirs), "bfloat16").passed is passes


def test_the_table_is_whole_on_eighty_columns() -> None:
    ours, theirs = _run(num_equal_tokens=3, first_margin=0.012, kl_mean=1.1), _run()
    stream = io.StringIO()
    print_full_check(_report(ours, theirs, "bfloat16"), Console(file=stream, width=80, highlight=False))
    lines = stream.getvalue().splitlines()
    assert lines[1].startswith("prompt 1, 5 tokens: The capital of France") and lines[1].endswith("...")
    rows = [line.split() for line in lines if "bfloat16 " in line and "perplexity" not in line]
    assert ["1", "this", "build,", "bfloat16", "3/8", "1.2e-02", "95.0%", "1e+00", "1e-06"] in rows
    assert ["transformers,", "bfloat16", "8/8", "95.0%", "1e-07", "1e-06"] in rows
    assert "FAILED: mean KL divergence from the reference 1.1e+00 nats, at most 1.0e-05" in lines
    assert lines[-1].startswith("FAILED")


def test_reports_of_both_kinds_become_json() -> None:
    report = _report(_run(kl_max=math.inf), None, "float32")
    values = json.loads(report_json(report))
    assert values["passed"] is True and values["prompts"][0]["ours"]["kl_max"] == "inf"
    assert values["prompts"][0]["transformers"] is None and len(values["rules"]) == 3
    rows = CheckReport([CheckRow(stage="fuse", name="one", error=math.inf)], {"model": "m"})
    assert json.loads(report_json(rows))["rows"][0]["error"] == "inf"
