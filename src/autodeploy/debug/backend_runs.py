"""Backend runs: a model and some sequences go in; what each backend gives while it generates comes out.

The first backend chooses the tokens that all are shown, so that a near tie in one step does not make all later ones
differ. Rows take turns in how they draw, and steps are run as an engine runs them, graphs prepared for the states. So
a backend with graphs chooses inside of them; what it chose is beside what its logits say outside.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from autodeploy.build import build
from autodeploy.compile.cuda_graph import FACT, IN_GRAPH
from autodeploy.compile.program import BatchLimits, Draws, Program
from autodeploy.config import CompileOptions, Options
from autodeploy.debug.graph_run import PAGE_SIZE
from autodeploy.debug.packed_run import Span, fresh_states, step_batch
from autodeploy.ops.sampling import choose_tokens

COMPARED = ("torch-simple", "torch-compile", "torch-cudagraph", "torch-opt")
NUM_TOKENS = 6
"""generated after each sequence"""
STEPS_ALIKE = 2
"""steps in which a row draws in one way, so that parameters are both kept and replaced"""
WAYS = (
    {"temperature": 0.0, "top_p": 1.0, "min_p": 0.0, "top_k": 0},
    {"temperature": 0.7, "top_p": 0.9, "min_p": 0.0, "top_k": 20},
    {"temperature": 1.3, "top_p": 1.0, "min_p": 0.05, "top_k": 0},
    {"temperature": 1.0, "top_p": 1.0, "min_p": 0.0, "top_k": 0},
)
"""how rows draw: the most likely token, with filters, without"""


def compared_backends(device: torch.device) -> Sequence[str]:
    """Backends that are compared with each other on a device, the one they are measured by first."""
    return COMPARED if device.type == "cuda" else ()


@dataclass(frozen=True)
class BackendRun:
    """What a backend gave.

    Attributes:
        logits: `[steps * sequences, V]`, float32 on the CPU, in the order of the steps.
        token_ids: int64 `[steps * sequences]`, chosen from them by `choose_tokens` behind each step.
        in_graph: bool `[steps * sequences]`, where a graph chose a token too.
        in_graph_agrees: bool, where that is the same one.
        choice: of a backend with graphs, whether these choose tokens, or why not; None of another.
        steps: of a backend with graphs, how many steps ran in which way.
        not_captured: reasons, where a kind of graph could not be captured.
    """

    logits: Tensor
    token_ids: Tensor
    in_graph: Tensor
    in_graph_agrees: Tensor
    choice: str | None
    steps: Mapping[str, int]
    not_captured: Mapping[str, str]

    @property
    def chooses_otherwise(self) -> bool:
        """Whether a graph chose a token that its logits do not give."""
        return bool((self.in_graph & ~self.in_graph_agrees).any())

    @property
    def is_partly_unseen(self) -> bool:
        """Whether something of what an engine would do was not done."""
        return bool(self.not_captured) or (self.choice == IN_GRAPH and not bool(self.in_graph.any()))

    def described(self, first: "BackendRun") -> str:
        """What was found, beside the run of the first backend, in one line."""
        num_equal = int((self.token_ids == first.token_ids).sum())
        parts = [f"{num_equal} of {len(self.token_ids)} tokens are those of the first backend"]
        parts += [f"{count} steps {way}" for way, count in self.steps.items()]
        if bool(self.in_graph.any()):
            agreeing, count = int(self.in_graph_agrees.sum()), int(self.in_graph.sum())
            parts.append(f"{agreeing} of {count} tokens chosen in graphs are what their logits give")
        elif self.choice is not None:
            parts.append("no token was chosen in a graph" + (f": {self.choice}" if self.choice != IN_GRAPH else ""))
        parts += [f"not captured {kind}: {why}" for kind, why in self.not_captured.items()]
        return "; ".join(parts)


def run_backend(
    module: nn.Module, options: CompileOptions, backend: str, rows: Sequence[Tensor], shown: Tensor | None = None
) -> BackendRun:
    """Prefill all sequences in one step, then generate.

    Args:
        module: with its weights.
        shown: token ids that another run chose; default: those that this one chooses.
    """
    chosen = replace(options, compile_backend=backend, check_isolation=False)
    program = build(module, Options(compile=chosen))
    steps = _generate(program, [row.clone() for row in rows], shown)
    logits, token_ids, in_graph, in_graph_agrees = (torch.cat(column) for column in zip(*steps, strict=True))
    facts = program.report.facts.get(FACT, {}).get("text", {})
    return BackendRun(
        *(logits, token_ids, in_graph, in_graph_agrees),
        choice=facts.get("choice"),
        steps=dict(facts.get("steps", {})),
        not_captured=dict(facts.get("not_captured", {})),
    )


_Step = tuple[Tensor, Tensor, Tensor, Tensor]
"""The first four attributes of a `BackendRun`, of one step."""


def _generate(program: Program, rows: list[Tensor], shown: Tensor | None) -> list[_Step]:
    longest = [torch.zeros(len(row) + NUM_TOKENS) for row in rows]
    states = fresh_states(program.states, longest, program.device, PAGE_SIZE)
    limits = BatchLimits(
        max_num_seqs=len(rows) + 1,
        max_num_batched_tokens=sum(map(len, rows)) + 1,
        max_model_len=max(map(len, longest)),
        page_size=PAGE_SIZE,
    )
    program.prepare(states, limits)
    draws = [_draws(len(rows), turn, program.device) for turn in range(-(-NUM_TOKENS // STEPS_ALIKE))]
    steps: list[_Step] = []
    done = [0] * len(rows)
    for number in range(NUM_TOKENS):
        spans = [Span(index, done[index], len(row)) for index, row in enumerate(rows)]
        batch = step_batch(program.states, _padded(rows, longest), spans, program.device, PAGE_SIZE)
        batch["logits_indices"] = batch["cu_seqlens"][1:].long() - 1
        steps.append(_run(program, batch, states, draws[number // STEPS_ALIKE]))
        tokens = steps[-1][1] if shown is None else shown[number * len(rows) : (number + 1) * len(rows)]
        done = [len(row) for row in rows]
        rows = [torch.cat((row, token[None])) for row, token in zip(rows, tokens, strict=True)]
    return steps


def _draws(num_rows: int, turn: int, device: torch.device) -> Draws:
    """How rows draw, each with a key of its own; in the next turn each draws in the next way."""
    ways = [WAYS[(row + turn) % len(WAYS)] for row in range(num_rows)]
    shares = [[way[name] for way in ways] for name in ("temperature", "top_p", "min_p")]
    numbers = [[int(way["top_k"]) for way in ways], list(range(1, num_rows + 1))]
    return Draws(torch.tensor(shares, device=device), torch.tensor(numbers, device=device), has_filters=True)


@torch.inference_mode()
def _run(program: Program, batch: Mapping[str, Tensor], states: Mapping[str, Tensor], draws: Draws) -> _Step:
    """A step as an engine runs it, and a choice behind it, from the same logits and by the same kernel."""
    logits, chosen = program.run_and_choose(batch, states, draws)
    temperature, top_p, min_p = draws.shares
    top_k, keys = draws.numbers
    choose = program.choose_tokens or choose_tokens.reference
    tokens, best = choose(logits, temperature, top_k, top_p, min_p, keys, batch["seq_lens"].long())
    in_graph = torch.full_like(tokens, chosen is not None, dtype=torch.bool)
    agrees = in_graph
    if chosen is not None:
        agrees = (chosen[0] == tokens) & torch.isclose(chosen[1], best, rtol=0.0, atol=0.0, equal_nan=True)
    copies = logits.to("cpu", torch.float32, copy=True)  # the graph's own hold until the next step
    return copies, tokens.cpu(), in_graph.cpu(), agrees.cpu()


def _padded(rows: Sequence[Tensor], longest: Sequence[Tensor]) -> list[Tensor]:
    """Rows of their final lengths, by which pages are laid out; what is still to come is not looked at."""
    return [torch.cat((row, row.new_zeros(len(whole) - len(row)))) for row, whole in zip(rows, longest, strict=True)]
