"""Instant-on: a model's first start serves with the model's own code at once, while its graph is built beside it.

deploy       a model -> the program to serve with now, and the one to go on with
live program the module with its weights, run over pages by `capture/live.py`
successor    a process that builds the graph into the cache; then this process restores it, as any later start does

The graph's process leaves this one's interpreter and module alone, and outlives it, so that even a start that ends
after its first answer leaves a kept graph behind.
"""

import atexit
import dataclasses
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import Future
from typing import Any

import torch
from torch import nn

from autodeploy.build import Subject, build, resolve_device, subject_of_model
from autodeploy.compile.backends import require_backend
from autodeploy.compile.program import NamedGraph, Program, Progress
from autodeploy.config import Options, SpeculativeOptions, parse_options
from autodeploy.debug.isolation import check_apart
from autodeploy.errors import AutoDeployError, UnsupportedModelError
from autodeploy.graph_cache import GraphCache
from autodeploy.kernels.provider import is_prepared, mixer_priority
from autodeploy.memory import available_bytes
from autodeploy.models.locate import LocatedModel

logger = logging.getLogger(__name__)

LEAST_BYTES = 64 * 2**20
"""Smaller models are built about as fast as a second process starts."""
COPIES = 4
"""Weights that stand in memory for a moment: the module's, the other process's, the graph's, and room to spare."""
HEAD_START_SECONDS = 0.5
"""For the first answer, which the other process would slow down."""


def deploy(
    model: LocatedModel | nn.Module, options: Options, progress: Progress | None = None
) -> tuple[Program, Future[Program] | None]:
    """The program to serve with, and the one to go on with when there will be a better one.

    Raises:
        AutoDeployError: as `build`.
    """
    require_backend(options.compile.compile_backend, resolve_device(options.compile.device))
    if isinstance(model, LocatedModel) and _is_worthwhile(model, options):
        try:
            program = live_program(model, options, progress or (lambda _: None))
        except UnsupportedModelError as reason:
            logger.info("the graph is built before the first answer: %s", reason)
        else:
            return program, successor(model, options)
    return build(model, options, progress=progress), None


def _is_worthwhile(model: LocatedModel, options: Options) -> bool:
    """Whether there is a graph to wait for, and room for the weights to exist several times meanwhile."""
    speculation = SpeculativeOptions.of(options.engine.speculative_config)
    if speculation is not None and speculation.uses_head:
        return False  # a head reads what only the graph keeps
    if options.compile.batch_invariant:
        return False  # the model's own code adds up as it likes
    device = resolve_device(options.compile.device)
    num_bytes = sum(path.stat().st_size for path in model.weight_files)
    asked_for = options.compile.instant_on and not options.compile.strict and options.model.load_format == "auto"
    if not asked_for or options.engine.runtime != "engine" or options.compile.quantization is not None:
        return False  # the model's own code would answer with other numbers than its graph with rounded weights
    if options.compile.kv_cache_dtype != "auto":
        return False  # nor does it round keys and values
    if device.type != "cpu" or num_bytes < LEAST_BYTES or COPIES * num_bytes > available_bytes(device):
        return False
    if not GraphCache.is_wanted(options) or _work(model, options) is None:
        return False
    return GraphCache.kept(model, device, options) is None


def live_program(model: LocatedModel, options: Options, progress: Progress) -> Program:
    """The model's own code as a program.

    Raises:
        UnsupportedModelError: its code cannot run over pages, or lets packed sequences influence each other.
    """
    from autodeploy.capture.live import LiveModel  # transformers, which a kept graph does without

    progress("starting with the model's own code, while its graph is built")
    device = resolve_device(options.compile.device)
    subject = subject_of_model(model, options)
    module = _with_weights(subject, device)
    providers = mixer_priority(device, options.compile.attn_backend) if is_prepared(device) else ()
    live = LiveModel(module, providers)
    names = tuple(spec.name for spec in live.states)
    num_bytes = sum(parameter.nbytes for parameter in module.parameters())
    program = Program(
        graphs={"text": NamedGraph("text", live, live.batch_inputs, names)},
        states=tuple(live.states),
        vocab_size=live.vocab_size,
        max_model_len=subject.max_model_len,
        dtype=subject.dtype,
        device=device,
        weight_bytes=num_bytes,
        step_weight_bytes=num_bytes,
        eos_token_ids=subject.eos_token_ids,
    )
    program.report.facts.update(subject.facts, graph="the model's own code, until its graph is built")
    check_apart(program, live.example, live.example_logits)
    return program


def _with_weights(subject: Subject, device: torch.device) -> nn.Module:
    """The subject's module with its weights, and buffers that checkpoints hold; tied ones are one tensor.

    Weights that are stored as they are used stay views of the mapped files: nothing is copied for the moment.
    """
    module = subject.module
    assert module is not None
    loaded = {
        id(value): nn.Parameter(subject.read(name).to(device, value.dtype), requires_grad=False)
        for name, value in module.named_parameters()
    }
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                owner._parameters[name] = loaded[id(parameter)]
    stored = set(module.state_dict())
    for name, buffer in module.named_buffers():
        if name in stored:
            buffer.copy_(subject.read(name))
    return module


def successor(model: LocatedModel, options: Options) -> Future[Program]:
    """Build the model's graph in a process of its own, then restore it here; the result may be an AutoDeployError."""
    future: Future[Program] = Future()
    work = _work(model, options)
    assert work is not None
    builder = _Builder(work)
    atexit.register(
        builder.start
    )  # a process that ends before its head start is over leaves a graph behind all the same

    def run() -> None:
        try:
            time.sleep(HEAD_START_SECONDS)
            builder.finish()
            future.set_result(build(model, options))
        except Exception as error:  # whatever happened, those who wait must hear of it
            future.set_exception(error)
        finally:
            atexit.unregister(builder.start)

    threading.Thread(target=run, name="autodeploy-successor", daemon=True).start()
    return future


def _work(model: LocatedModel, options: Options) -> str | None:
    """What the other process is to build, as JSON; None where an option is not the same after JSON."""
    try:
        values = {name: value for part in dataclasses.asdict(options).values() for name, value in part.items()}
        work = json.dumps({"model": str(model.folder), "options": values})
    except (TypeError, ValueError):
        return None
    return work if json.loads(work)["options"] == values else None


class _Builder:
    """The process that builds a graph, started once."""

    def __init__(self, work: str) -> None:
        self._work = work
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        # No pipe: it would break when this process ends first.
        self._said = tempfile.TemporaryFile("w+")  # noqa: SIM115  (closed by `finish`)

    def start(self) -> subprocess.Popen[str]:
        with self._lock:
            if self._process is None:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "autodeploy.instant_on"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.DEVNULL,
                    stderr=self._said,
                    env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},  # the same code as here
                    start_new_session=True,
                    text=True,
                )
                assert self._process.stdin is not None
                self._process.stdin.write(self._work)
                self._process.stdin.close()
            return self._process

    def finish(self) -> None:
        """Wait for its end. Raises UnsupportedModelError with its last words when it failed."""
        status = self.start().wait()
        with self._said as said:
            said.seek(0)
            lines = said.read().strip().splitlines() or [f"exit status {status}"]
        if status != 0:
            raise UnsupportedModelError(f"the graph could not be built: {lines[-1]}")


def main() -> int:
    """Build the model described on standard input, so that its graph is kept."""
    work: dict[str, Any] = json.load(sys.stdin)
    try:
        build(work["model"], parse_options(work["options"]))
    except AutoDeployError as error:
        print(f"{type(error).__name__}: {error}".replace("\n", " "), file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
