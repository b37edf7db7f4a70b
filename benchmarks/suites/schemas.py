"""Published JSON schemas through guided decoding: every answer fits its schema, or the schema is refused with words."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from suites.setting import Setting

CLIENT = Path(__file__).with_name("schema_client.py")


def run(setting: Setting) -> dict[str, Any]:
    """Send them all; what becomes of each."""
    number = 8 if setting.is_smoke else 100_000
    printed = setting.run(["python", str(CLIENT), setting.url, setting.model, str(number)])
    return summary([json.loads(line) for line in printed.splitlines()])


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """How many of each kind. Nothing may fail, and no answer may break its schema."""
    kinds = Counter(result["kind"] for result in results)
    reasons = Counter(result["why"].rpartition(": ")[2] for result in results if result["kind"] == "refused")
    tried = len(results) - kinds["no schema"]
    return {
        "passed": kinds["failed"] == kinds["invalid"] == 0,
        "schemas": tried,
        "kinds": dict(kinds),
        "served_fraction": round((tried - kinds["refused"]) / max(1, tried), 3),
        "reasons_of_refusals": dict(reasons.most_common(20)),
        "results": results,
    }
