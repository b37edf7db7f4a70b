"""GraphCache: lowered graphs kept between starts, under everything they depend on.

A key holds the model's stored config, names, shapes and dtypes of its weights, the options, the versions of torch and
transformers, the kernels that can run here and the text of this package's compiler half. What is kept has been checked
for isolation when it was built; the check looks at structure, which the key pins, and is not repeated. What the runtime
must know of the model is kept beside the graph, so that a later start needs neither transformers nor the module.
"""

import dataclasses
import functools
import hashlib
import logging
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from autodeploy.cache_dir import discard, entry, fill
from autodeploy.config import INDUCTOR_BACKENDS, Options
from autodeploy.errors import ConfigError
from autodeploy.graph.model_graph import ModelGraph
from autodeploy.graph.report import BuildReport, TransformReport
from autodeploy.graph.saved import NotSavable, describe, restore, save
from autodeploy.kernels.provider import is_prepared, unavailable
from autodeploy.models.locate import LocatedModel

logger = logging.getLogger(__name__)

COMPILER_HALF = ("capture", "checkpoint", "graph", "kernels", "models", "ops", "transforms", "build.py")
"""Parts of the package whose text decides what a lowered graph looks like."""

WITHOUT_EFFECT = ("instant_on", "weight_cache", "cudagraph_capture_sizes")
"""Options that a lowered graph does not depend on."""

KEPT_FACTS = ("captured_nodes", "layers", "isolation")
"""Facts of the report that only the first build can find."""


@dataclass
class GraphCache:
    """One entry of the cache: where it lies, and whether it was used."""

    path: Path
    is_savable: bool = False
    _description: dict[str, Any] = field(default_factory=dict)

    @staticmethod
    def is_wanted(options: Options) -> bool:
        """Whether graphs are kept under these options."""
        is_kept = options.compile.graph_cache and not options.model.trust_remote_code
        return is_kept and options.compile.compile_backend not in INDUCTOR_BACKENDS

    @classmethod
    def kept(cls, model: LocatedModel, device: torch.device, options: Options) -> "GraphCache | None":
        """The entry of a graph that an earlier start kept; None when there is none.

        Where kernels are still to be compiled, nothing can have been kept for them.
        """
        cache = cls.of(model, device, options) if is_prepared(device) else None
        return cache if cache is not None and cache.path.is_dir() else None

    @classmethod
    def of(cls, model: LocatedModel, device: torch.device, options: Options) -> "GraphCache | None":
        """The entry for a model, whether it exists or not; None where graphs are not kept.

        They are not kept for remote code, whose text no config tells, nor for Inductor, which has a cache of its own.
        """
        if not cls.is_wanted(options):
            return None
        compile_options = dataclasses.asdict(options.compile)
        key = {
            "config": model.config,
            "weights": model.stored.fingerprint(),
            "dtype": options.model.dtype,
            "model_kwargs": repr(sorted(options.model.model_kwargs.items())),
            "device": str(device),
            "options": {name: repr(value) for name, value in compile_options.items() if name not in WITHOUT_EFFECT},
            "versions": [torch.__version__, version("transformers")],
            "unavailable": unavailable(device),
            "code": _code_hash(),
        }
        return cls(entry("graphs", key))

    def restore(self, report: BuildReport) -> tuple[ModelGraph, dict[str, Any]] | None:
        """The kept graph and what was kept with it; its build's report goes into `report`.

        None when it cannot be read.
        """
        try:
            graph, extra = restore(self.path)
        except Exception as error:  # an entry is a convenience: whatever is wrong with it, the graph is built anew
            discard(self.path, "the graph", error)
            return None
        for saved in extra["transforms"]:
            report.transforms.append(TransformReport(**saved | {"refused": tuple(saved["refused"])}))
        report.kernels.update(extra["kernels"])
        report.kernel_reasons.update(extra["kernel_reasons"])
        report.facts.update(extra["facts"], graph="restored")
        return graph, extra["model"]

    def describe(self, graph: ModelGraph) -> None:
        """Take down a graph that was just lowered, before a backend changes it."""
        try:
            self._description = describe(graph)
            self.is_savable = True
        except NotSavable as reason:
            logger.info("the lowered graph is not kept: %s", reason)

    def save(self, graph: ModelGraph, report: BuildReport, model: dict[str, Any]) -> None:
        """Keep what was taken down, with the report and JSON values about the model; nothing if it came from here."""
        if not self.is_savable:
            return
        extra = {
            "transforms": [dataclasses.asdict(entry) for entry in report.transforms],
            "kernels": report.kernels,
            "kernel_reasons": report.kernel_reasons,
            "model": model,
            "facts": {name: report.facts[name] for name in KEPT_FACTS if name in report.facts},
        }
        try:
            fill(self.path, lambda folder: save(self._description, graph, folder, extra))
        except ConfigError as error:
            logger.warning("the graph is not kept for the next start: %s", error)


@functools.cache
def _code_hash() -> str:
    """A hash of the compiler half's text."""
    root, content = Path(__file__).parent, hashlib.sha256()
    for part in COMPILER_HALF:
        paths = [root / part] if part.endswith(".py") else sorted((root / part).rglob("*.[pch]*"))
        for path in paths:
            if path.suffix in (".py", ".cpp", ".h"):
                content.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return content.hexdigest()
