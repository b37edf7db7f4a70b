"""GraphCache: lowered graphs kept between starts, under everything they depend on.

A key holds the model's config, the dtype, the device, the compile options, the versions of torch and transformers, the
kernels that can run here and the text of this package's compiler half. What is kept has been checked for isolation when
it was built; the check looks at structure, which the key pins, and is not repeated.
"""

import dataclasses
import hashlib
import logging
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig

from autodeploy.cache_dir import entry, fill
from autodeploy.config import CompileOptions
from autodeploy.graph.model_graph import ModelGraph
from autodeploy.graph.report import BuildReport, TransformReport
from autodeploy.graph.saved import NotSavable, describe, restore, save
from autodeploy.kernels.provider import unavailable

logger = logging.getLogger(__name__)

COMPILER_HALF = ("capture", "checkpoint", "graph", "kernels", "models", "ops", "transforms", "build.py")
"""Parts of the package whose text decides what a lowered graph looks like."""


@dataclass
class GraphCache:
    """One entry of the cache: where it lies, and whether it was used."""

    path: Path
    is_savable: bool = False
    _description: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls, config: PreTrainedConfig | None, dtype: torch.dtype, device: torch.device, options: CompileOptions
    ) -> "GraphCache | None":
        """The entry for a model; None where graphs are not kept: no config to go by, Inductor, or not wanted."""
        if config is None or not options.graph_cache or options.compile_backend == "torch-compile":
            return None
        key = {
            "config": config.to_json_string(use_diff=False),
            "class": type(config).__qualname__,
            "dtype": str(dtype),
            "device": str(device),
            "options": {name: repr(value) for name, value in sorted(dataclasses.asdict(options).items())},
            "versions": [torch.__version__, transformers.__version__],
            "unavailable": unavailable(device),
            "code": _code_hash(),
        }
        return cls(entry("graphs", key))

    def restore(self, report: BuildReport) -> ModelGraph | None:
        """The kept graph, with what its build reported; None when there is none or it cannot be read."""
        if not self.path.is_dir():
            return None
        try:
            graph, extra = restore(self.path)
        except Exception as error:  # an entry is a convenience: whatever is wrong with it, the graph is built anew
            logger.warning("the graph kept in %s cannot be read (%s); building it anew", self.path, error)
            shutil.rmtree(self.path, ignore_errors=True)
            return None
        for saved in extra["transforms"]:
            report.transforms.append(TransformReport(**saved | {"refused": tuple(saved["refused"])}))
        report.kernels.update(extra["kernels"])
        report.kernel_reasons.update(extra["kernel_reasons"])
        report.facts.update(extra["facts"], graph="restored")
        return graph

    def describe(self, graph: ModelGraph) -> None:
        """Take down a graph that was just lowered, before a backend changes it."""
        try:
            self._description = describe(graph)
            self.is_savable = True
        except NotSavable as reason:
            logger.info("the lowered graph is not kept: %s", reason)

    def save(self, graph: ModelGraph, report: BuildReport) -> None:
        """Keep what was taken down, with the report; nothing when the graph came from here."""
        if not self.is_savable:
            return
        extra = {
            "transforms": [dataclasses.asdict(entry) for entry in report.transforms],
            "kernels": report.kernels,
            "kernel_reasons": report.kernel_reasons,
            "facts": {name: report.facts[name] for name in ("captured_nodes", "isolation") if name in report.facts},
        }
        fill(self.path, lambda folder: save(self._description, graph, folder, extra))


def _code_hash() -> str:
    """A hash of the compiler half's text."""
    root, content = Path(__file__).parent, hashlib.sha256()
    for part in COMPILER_HALF:
        paths = [root / part] if part.endswith(".py") else sorted((root / part).rglob("*.[pch]*"))
        for path in paths:
            if path.suffix in (".py", ".cpp", ".h"):
                content.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return content.hexdigest()
