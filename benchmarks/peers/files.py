"""A peer's own files of a model: a checkpoint folder goes in, the path that the peer loads comes out, written once."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from peers import environments
from peers.environments import NotAvailable

HERE = Path(__file__).parent


def llamacpp(precision: str, model: str, checkpoint: Path, build: Path) -> Path:
    """A GGUF file; those of fewer bits are made from the one in bfloat16."""
    target = _files(model, build) / "llama.cpp-bf16.gguf"
    path = _converted("llamacpp_convert.py", Path(sys.executable), checkpoint, target, "bf16")
    if precision == "bf16":
        return path
    python = environments.python(build, "llamacpp")
    return _converted("llamacpp_convert.py", python, path, target.with_name(f"llama.cpp-{precision}.gguf"), precision)


def openvino(precision: str, model: str, checkpoint: Path, build: Path) -> Path:
    """A folder by optimum."""
    exporter = environments.python(build, "openvino-export")
    target = _files(model, build) / f"openvino-{precision}"
    return _converted("genai_convert.py", exporter, checkpoint, target, precision)


def vllm(precision: str, model: str, checkpoint: Path, build: Path) -> Path:
    """The checkpoint itself, or one with quantised weights."""
    if precision == "bf16":
        return checkpoint
    target = _files(model, build) / f"vllm-{precision}"
    return _converted("vllm_convert.py", Path(sys.executable), checkpoint, target, precision)


FILES: dict[str, Callable[[str, str, Path, Path], Path]] = {
    "llama.cpp": llamacpp,
    "OpenVINO GenAI": openvino,
    "vLLM CPU": vllm,
}
"""Peer -> its function of precision, model, checkpoint and build folder; the others load the checkpoint. They raise
`NotAvailable` with the reason, and can take many minutes the first time."""


def _files(model: str, build: Path) -> Path:
    folder = build / "models" / model.replace("/", "-")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _converted(script: str, python: Path, source: Path, target: Path, precision: str) -> Path:
    """The peer's own files at `target`, written to a neighbour first so that half of them is never taken for all."""
    if target.exists():
        return target
    partial = target.with_name(f"partial-{target.name}")
    print(f"writing {target}", flush=True)
    command = [str(python), str(HERE / script), str(source), str(partial), precision]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode or not partial.exists():
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["no message"]
        errors = [line for line in lines if "Error" in line] or lines
        raise NotAvailable(f"no {precision} files: {errors[-1][:300]}")
    partial.rename(target)
    return target
