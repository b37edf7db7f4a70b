"""Schemathesis: requests drawn from the server's own OpenAPI document, and whether the answers are what it says."""

import json
from typing import Any

from suites.setting import Setting

CHECKS = "not_a_server_error,response_schema_conformance,content_type_conformance,status_code_conformance"
FOUND_FAILURES = 1


def run(setting: Setting) -> dict[str, Any]:
    """Draw them; what they found."""
    report = setting.scratch / "report.json"
    flags = {"--max-examples": 3 if setting.is_smoke else 200, "--checks": CHECKS, "--seed": 0}
    flags |= {"--report": "json", "--report-json-path": report, "--request-timeout": 60}
    printed = setting.run(["schemathesis", "run", f"{setting.url}/openapi.json"], flags, statuses=(0, FOUND_FAILURES))
    found = summary(json.loads(report.read_text(encoding="utf-8")))
    return found if found["passed"] else found | {"printed": printed[-4000:]}


def summary(report: dict[str, Any]) -> dict[str, Any]:
    """Cases, failures, and how many requests of each route were served rather than refused."""
    cases = report["test_cases"]
    broken = cases["with_failures"] + cases["errored"] + len(report["errors"])
    served = {
        route: {answer: sum(phase[answer] for phase in phases.values()) for answer in ("accepted", "rejected")}
        for route, phases in report["valid_rates"].items()
    }
    return {
        "passed": report["complete"] and broken == 0 and cases["generated"] > 0,
        "cases": cases,
        "routes": report["operations"],
        "served": served,
        "failures": report["failures"],
        "errors": report["errors"],
    }
