"""What tests of CUDA graphs do without a device: a checker captures in its place, and refuses what it would refuse."""

from typing import Any

import pytest
import torch

from autodeploy.build import build
from autodeploy.compile import backends
from autodeploy.compile.cuda_graph import FACT
from autodeploy.compile.program import Program
from autodeploy.config import parse_options
from autodeploy.debug.capture_checker import CaptureChecker


def capture_with_checker(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on, backends that capture graphs build on the CPU."""
    monkeypatch.setattr(backends, "graph_capture", lambda device: CaptureChecker)


def program(model: torch.nn.Module, backend: str = "torch-cudagraph", **options: object) -> Program:
    """The model on the CPU by a backend."""
    values = {"device": "cpu", "compile_backend": backend, "check_isolation": False, **options}
    return build(model, parse_options(values))


def facts(built: Program, graph: str = "text") -> dict[str, Any]:
    """What the report says of a graph's captures."""
    found: dict[str, Any] = built.report.facts[FACT][graph]
    return found
