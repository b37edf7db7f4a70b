"""The record of a comparison: what was measured goes in, JSON with all conditions it was measured under is written."""

import dataclasses
import json
import platform
import sys
import time
from pathlib import Path
from typing import Any

from autodeploy.bench import record
from peers import environments


def write(
    output: Path,
    benchmark: str,
    model: str,
    load: Any,
    limits: list[dict[str, Any]],
    groups: dict[str, Any],
    missing: dict[str, str],
    used: list[str],
    build: Path,
) -> Path:
    """Write `BENCHMARK-MODEL_MACHINE_TIME.json` and return its path.

    Args:
        load: a dataclass: what was asked.
        limits: the machine's, of every round.
        groups: precision -> samples and what failed.
        missing: what could not be run -> why.
        used: names of environments.
    """
    raw = {
        "benchmark": benchmark,
        "command": sys.argv,
        "model": model,
        "load": dataclasses.asdict(load),
        "limits": limits,
        "precisions": groups,
        "not_available": missing,
        "machine": record.machine(),
        "versions": record.versions(),
        "environments": {
            name: {"note": environments.ENVIRONMENTS[name].note, "packages": environments.versions(build, name)}
            for name in used
        },
    }
    output.mkdir(parents=True, exist_ok=True)
    path = output / f"{benchmark}-{model.replace('/', '-')}_{platform.machine()}_{time.strftime('%Y%m%d-%H%M')}.json"
    path.write_text(json.dumps(raw, indent=1) + "\n", encoding="utf-8")
    return path
