"""Backend runs: a model and some sequences go in; the logits that each backend gives while it generates come out.

The first backend chooses the tokens, greedily; the others are shown the same, so that a near tie in one step does not
make all later ones differ. Graphs are prepared for the states as an engine does it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from autodeploy.build import build
from autodeploy.compile.cuda_graph import FACT
from autodeploy.compile.program import BatchLimits, Program
from autodeploy.config import CompileOptions, Options
from autodeploy.debug.graph_run import PAGE_SIZE
from autodeploy.debug.packed_run import Span, fresh_states, step_batch

COMPARED = ("torch-simple", "torch-compile", "torch-cudagraph", "torch-opt")
NUM_TOKENS = 6
"""generated after each sequence"""


def compared_backends(device: torch.device) -> Sequence[str]:
    """Backends that are compared with each other on a device, the one they are measured by first."""
    return COMPARED if device.type == "cuda" else ()


@dataclass(frozen=True)
class BackendRun:
    """What a backend gave.

    Attributes:
        logits: `[steps * sequences, V]`, float32 on the CPU, in the order of the steps.
        token_ids: the most likely token of each row.
        steps: of a backend with graphs, how many steps ran in which way.
        not_captured: reasons, where a kind of graph could not be captured.
    """

    logits: Tensor
    steps: Mapping[str, int]
    not_captured: Mapping[str, str]

    @property
    def token_ids(self) -> Tensor:
        return self.logits.argmax(-1)


def run_backend(
    module: nn.Module, options: CompileOptions, backend: str, rows: Sequence[Tensor], shown: Tensor | None = None
) -> BackendRun:
    """Prefill all sequences in one step, then generate.

    Args:
        module: with its weights.
        shown: token ids that another run chose; default: the most likely ones.
    """
    chosen = replace(options, compile_backend=backend, check_isolation=False)
    program = build(module, Options(compile=chosen))
    logits = _generate(program, [row.clone() for row in rows], shown)
    facts = program.report.facts.get(FACT, {}).get("text", {})
    return BackendRun(logits, dict(facts.get("steps", {})), dict(facts.get("not_captured", {})))


def _generate(program: Program, rows: list[Tensor], shown: Tensor | None) -> Tensor:
    longest = [torch.zeros(len(row) + NUM_TOKENS) for row in rows]
    states = fresh_states(program.states, longest, program.device, PAGE_SIZE)
    limits = BatchLimits(
        max_num_seqs=len(rows) + 1,
        max_num_batched_tokens=sum(map(len, rows)) + 1,
        max_model_len=max(map(len, longest)),
        page_size=PAGE_SIZE,
    )
    program.prepare(states, limits)
    collected: list[Tensor] = []
    done = [0] * len(rows)
    for step in range(NUM_TOKENS):
        spans = [Span(index, done[index], len(row)) for index, row in enumerate(rows)]
        batch = step_batch(program.states, _padded(rows, longest), spans, program.device, PAGE_SIZE)
        batch["logits_indices"] = batch["cu_seqlens"][1:].long() - 1
        collected.append(program.run(batch, states).float().cpu())
        tokens = collected[-1].argmax(-1) if shown is None else shown[step * len(rows) : (step + 1) * len(rows)]
        done = [len(row) for row in rows]
        rows = [torch.cat((row, token[None])) for row, token in zip(rows, tokens, strict=True)]
    return torch.cat(collected)


def _padded(rows: Sequence[Tensor], longest: Sequence[Tensor]) -> list[Tensor]:
    """Rows of their final lengths, by which pages are laid out; what is still to come is not looked at."""
    return [torch.cat((row, row.new_zeros(len(whole) - len(row)))) for row, whole in zip(rows, longest, strict=True)]
