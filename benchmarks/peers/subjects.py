"""Which peers there are, where each runs, at which precisions; and a subject made ready to run.

A subject is a peer at one precision of weights. `prepare` makes its environment and its model files where they are
missing, so that a benchmark run measures only.
"""

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import autodeploy
from peers import environments
from peers.environments import NotAvailable
from peers.files import FILES, HERE
from peers.process import Peer

SOURCE = str(Path(str(autodeploy.__file__)).parents[1])  # the code that runs here, installed or not


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A peer.

    Attributes:
        adapter: its script in this folder.
        environment: the environment that it runs in; None for AutoDeploy's own, which transformers shares.
        precisions: precision -> None, or why it is not run at that one.
        variables: environment variables of its process.
    """

    adapter: str
    environment: str | None = None
    precisions: dict[str, str | None] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)


_EVERY: dict[str, str | None] = {"bf16": None, "int8": None, "int4": None}
_VLLM = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_TARGET_DEVICE": "cpu",
    "HF_HUB_OFFLINE": "1",
}
KINDS = {
    "AutoDeploy": Kind(adapter="ours.py", precisions=_EVERY),
    "transformers": Kind(
        adapter="hf.py",
        precisions={"float32": None, "bf16": None} | dict.fromkeys(("int8", "int4"), "needs another package for them"),
    ),
    "llama.cpp": Kind(adapter="llamacpp.py", environment="llamacpp", precisions=_EVERY),
    "OpenVINO GenAI": Kind(adapter="genai.py", environment="openvino", precisions=_EVERY),
    "vLLM CPU": Kind(
        adapter="vllmcpu.py",
        environment="vllm",
        precisions={"bf16": None, "int8": None, "int4": "its products with weights of 4 bits need AVX-512"},
        variables=_VLLM,
    ),
}


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A peer at one precision, ready to be launched."""

    name: str
    precision: str
    command: list[str]
    job: dict[str, Any]
    variables: dict[str, str]
    log: Path

    def launch(self) -> Peer:
        return Peer(self.command, self.job, self.variables, self.log)


def prepare(name: str, precision: str, model: str, checkpoint: Path, build: Path) -> Subject:
    """A subject with all it needs in place; the first time this can take many minutes.

    Raises:
        NotAvailable: with the reason.
    """
    kind = KINDS[name]
    if reason := kind.precisions[precision]:
        raise NotAvailable(reason)
    python = environments.python(build, kind.environment) if kind.environment else Path(sys.executable)
    path = FILES[name](precision, model, checkpoint, build) if name in FILES else checkpoint
    threads = len(os.sched_getaffinity(0))
    return Subject(
        name=name,
        precision=precision,
        command=[str(python), str(HERE / kind.adapter)],
        job={"model": str(path), "precision": precision, "threads": threads},
        variables={"OMP_NUM_THREADS": str(threads)} | kind.variables if kind.environment else {"PYTHONPATH": SOURCE},
        log=build / f"{name.lower().replace(' ', '-')}.log",
    )


def vocab_size(checkpoint: Path) -> int:
    """Of a checkpoint's config."""
    return int(json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))["vocab_size"])
