"""AutoDeploy: an off-the-shelf PyTorch language model goes in, served tokens come out.

    from autodeploy import LLM, SamplingParams

    with LLM("path/to/checkpoint") as llm:
        outputs = llm.generate(["Hello, my name is"], SamplingParams(max_tokens=32))

The public names are imported when they are first used, so that `import autodeploy` and `autodeploy --help` are instant;
`__init__.pyi` shows the same names to type checkers.
"""

import importlib
import sys
from types import ModuleType
from typing import Any

from autodeploy.start_up import without_collection

_HOMES = {
    "LLM": "autodeploy.llm",
    "PendingOutput": "autodeploy.llm",
    "SamplingParams": "autodeploy.runtime.request",
    "StructuredOutputsParams": "autodeploy.runtime.structured_outputs",
    "Logprob": "autodeploy.runtime.request",
    "RequestOutput": "autodeploy.outputs",
    "CompletionOutput": "autodeploy.outputs",
    "build": "autodeploy.build",
    "check": "autodeploy.debug.check",
    "CheckReport": "autodeploy.debug.check_report",
    "FullReport": "autodeploy.debug.full_report",
    "Program": "autodeploy.compile.program",
    "BuildReport": "autodeploy.graph.report",
    "Options": "autodeploy.config",
    "ModelOptions": "autodeploy.config",
    "CompileOptions": "autodeploy.config",
    "EngineOptions": "autodeploy.config",
    "AutoDeployError": "autodeploy.errors",
    "ConfigError": "autodeploy.errors",
    "ModelNotFoundError": "autodeploy.errors",
    "CheckpointError": "autodeploy.errors",
    "UnsupportedModelError": "autodeploy.errors",
    "CaptureError": "autodeploy.errors",
    "GraphLevelError": "autodeploy.errors",
    "TokenMixingError": "autodeploy.errors",
    "TransformError": "autodeploy.errors",
    "OutOfMemoryError": "autodeploy.errors",
    "InvalidRequestError": "autodeploy.errors",
    "EngineOverloadedError": "autodeploy.errors",
    "EngineDeadError": "autodeploy.errors",
}
"""public name -> the module it lives in"""

__all__ = ["__version__", *_HOMES]


class _Package(ModuleType):
    """Keeps `autodeploy.build` the function: importing the module of that name would put the module in its place."""

    @property
    def build(self) -> Any:
        with without_collection():
            return importlib.import_module("autodeploy.build").build

    @build.setter
    def build(self, module: ModuleType) -> None:
        """What the import system does after importing a submodule; it stays reachable with `from autodeploy.build`."""


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return _version()
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    with without_collection():
        return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)


def _version() -> str:
    from importlib import metadata

    try:
        return metadata.version("autodeploy")
    except metadata.PackageNotFoundError:  # run from a source tree
        return "0+unknown"
