"""A check's report as JSON, of either kind: all its fields, and whether it passed."""

import dataclasses
import json
import math
from typing import Any

from autodeploy.debug.check_report import CheckReport
from autodeploy.debug.full_report import FullReport


def report_json(report: CheckReport | FullReport) -> str:
    """The report as text. A number that is not finite, which JSON does not know, is a string: `inf`, `nan`."""
    values = dataclasses.asdict(report) | {"passed": report.passed}
    if isinstance(report, FullReport):
        values["rules"] = [dataclasses.asdict(rule) | {"passed": rule.passed} for rule in report.rules]
    return json.dumps(_plain(values), indent=1) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
