"""Suites nobody here wrote, run against `autodeploy serve`, each with its own environment and its raw results as JSON.

    python benchmarks/suites.py                          # all of them
    python benchmarks/suites.py lm-eval schemas --output benchmarks/results

Each gets a fresh server. The environments are made where they are missing, below the build folder. Ends with status 1
where a suite did not pass; what could not be run here is in its record, with the reason.
"""

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peers import environments, models
from peers.process import PeerError, Server
from peers.subjects import SOURCE
from suites import lm_eval, loads, openapi, schemas
from suites.setting import Setting, SuiteError

from autodeploy.bench import record

NAME = "served"
REPOSITORY = Path(__file__).parents[1]


@dataclass(frozen=True, kw_only=True)
class Suite:
    """A suite, the environment it runs in, and the server it wants.

    Attributes:
        model: of `peers.models`.
        options: flags of `autodeploy serve`.
    """

    run: Callable[[Setting], dict[str, Any]]
    environment: str
    model: str = "smollm2"
    options: tuple[str, ...] = ()


SUITES = {
    "lm-eval": Suite(run=lm_eval.run, environment="lm-eval", options=("--dtype", "float32")),
    "schemas": Suite(run=schemas.run, environment="schemas", model="tiny-text"),
    "schemathesis": Suite(
        run=openapi.run, environment="schemathesis", options=("--max-model-len", "64", "--max-num-seqs", "128")
    ),
    "guidellm": Suite(run=loads.guidellm, environment="guidellm"),
    "aiperf": Suite(run=loads.aiperf, environment="aiperf"),
    "vllm-bench": Suite(run=loads.vllm_bench, environment="vllm"),
}


def run(name: str, suite: Suite, build: Path, is_smoke: bool) -> dict[str, Any]:
    """The record of one suite."""
    result: dict[str, Any] = {"suite": name, "passed": False, "command": [Path(sys.argv[0]).name, *sys.argv[1:]]}
    result |= {"machine": record.machine(), "versions": record.versions()}
    try:
        python = environments.python(build, suite.environment)
        checkpoint = models.folder(build, suite.model)
        command = [sys.executable, "-m", "autodeploy", "serve", str(checkpoint), "--port", "{port}"]
        command += ["--served-model-name", NAME, *suite.options]
        log = build / f"suite-{name}.log"
        with tempfile.TemporaryDirectory() as scratch, Server(command, {"PYTHONPATH": SOURCE}, log) as server:
            server.wait_until_ready("/ready", 300)
            setting = Setting(
                url=server.url,
                model=NAME,
                checkpoint=checkpoint,
                python=python,
                scratch=Path(scratch),
                is_smoke=is_smoke,
            )
            began = time.perf_counter()
            result |= {"server": command[2:], "model": suite.model} | suite.run(setting)
            result |= {"seconds": time.perf_counter() - began, "commands": setting.commands}
            result = without_places(result, {checkpoint: "CHECKPOINT", Path(scratch): "SCRATCH", REPOSITORY: "."})
            result["environment"] = environments.versions(build, suite.environment)
    except (environments.NotAvailable, PeerError, SuiteError) as error:
        result["error"] = str(error)
    return result


def without_places(result: dict[str, Any], names: dict[Path, str]) -> dict[str, Any]:
    """The same result, with names for the places of one machine."""
    text = json.dumps(result)
    for place, name in names.items():
        text = text.replace(json.dumps(str(place))[1:-1], name)
    found: dict[str, Any] = json.loads(text)
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run the suites that are named; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suites", nargs="*", metavar="SUITE", help=f"of {', '.join(SUITES)}")
    parser.add_argument("--smoke", action="store_true", help="as little of each as shows that it runs")
    parser.add_argument("--build", type=Path, default=REPOSITORY / "build" / "peers")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/local"))
    given = parser.parse_args(arguments)
    if unknown := set(given.suites) - SUITES.keys():
        parser.error(f"there is no suite {min(unknown)}; there are {', '.join(SUITES)}")
    given.output.mkdir(parents=True, exist_ok=True)
    passed = True
    for name in given.suites or SUITES:
        result = run(name, SUITES[name], given.build.resolve(), given.smoke)
        path = given.output / f"suite-{name}_{platform.machine()}_{time.strftime('%Y%m%d-%H%M')}.json"
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"{name}: {'passed' if result['passed'] else 'NOT PASSED'}: {path}", result.get("error", ""), flush=True)
        passed = passed and result["passed"]
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
