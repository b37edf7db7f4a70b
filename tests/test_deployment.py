"""The files of deploy/ fit the command that they start."""

import re
from pathlib import Path

import yaml  # type: ignore[import-untyped]

from autodeploy.config import parse_options
from autodeploy.server.options import NAMES, ServerOptions, parse_server_options

ROOT = Path(__file__).resolve().parent.parent
DEPLOY = ROOT / "deploy"


def test_the_configuration_file_is_one_that_serve_reads() -> None:
    values = yaml.safe_load((DEPLOY / "serve.yaml").read_text(encoding="utf-8"))
    options = parse_server_options({name: value for name, value in values.items() if name in NAMES})
    engine = parse_options({name: value for name, value in values.items() if name not in NAMES}).engine
    assert options.log_format == "json" and engine.max_queued_requests == 256


def test_the_unit_gives_requests_time_to_finish() -> None:
    unit = (DEPLOY / "autodeploy.service").read_text(encoding="utf-8")
    stop = re.search(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)
    assert stop and int(stop[1]) > ServerOptions().drain_timeout_seconds + 10
    assert "--config /etc/autodeploy/serve.yaml" in unit and "KillSignal=SIGTERM" in unit


def test_the_image_copies_what_is_there_and_runs_unprivileged() -> None:
    image = (DEPLOY / "Dockerfile").read_text(encoding="utf-8")
    copied = [name for line in re.findall(r"^COPY (.*) \S+$", image, re.MULTILINE) for name in line.split()]
    assert copied and all((ROOT / name).exists() for name in copied)
    assert image.index("USER serve") < image.index("ENTRYPOINT") and '"autodeploy", "serve"' in image
