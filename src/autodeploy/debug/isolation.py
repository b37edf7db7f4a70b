"""The batch-isolation check: two sequences packed into one row, or one split over two steps, must change nothing.

Every op outside the token mixers must treat tokens one by one, and every token mixer must remember all it needs; an op
nobody recognised that does not would be wrong without any error. A negative control (the same row as one long sequence)
shows that the comparison could have failed.
"""

import itertools
from typing import Any

import torch
from torch import Tensor, fx

from autodeploy.compile.program import Program
from autodeploy.debug.packed_run import Span, fresh_states, run_packed, step_batch
from autodeploy.errors import TokenMixingError
from autodeploy.graph.model_graph import ModelGraph, module_path, source_line
from autodeploy.ops.attention import is_float8
from autodeploy.ops.op import OPS

LENGTHS = (5, 7)
SPLIT = 2
"""tokens of the first sequence that the first of two steps takes"""
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 8e-2, torch.float16: 2e-2}
"""Largest difference of a logit, as a share of the largest logit, that rounding in that dtype may cause."""
QUANTIZED_TOLERANCE = 5e-2
"""The same where activations or keys are rounded to few levels: the last bit of a sum may decide between two."""


def check_isolation(program: Program, graph: ModelGraph | None = None) -> str:
    """Compare packed with separate runs of two random sequences, and one of them with itself in two steps.

    A difference has to show again on other tokens: of two experts with the same score, rounding chooses, and may choose
    differently for one token.

    Args:
        program: any program with a `text` graph.
        graph: its graph, to name the node at fault.
    Returns:
        `passed`, or `inconclusive` when the negative control made no difference either.
    Raises:
        TokenMixingError: packed sequences influence each other, with the first node that shows it.
    """
    try:
        return _check_once(program, graph, seed=0)
    except TokenMixingError:
        return _check_once(program, graph, seed=1)


def _check_once(program: Program, graph: ModelGraph | None, seed: int) -> str:
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(0, program.vocab_size, (length,), generator=generator) for length in LENGTHS]
    packed = run_packed(program, rows)
    alone = torch.cat([run_packed(program, [row]) for row in rows])
    joined = run_packed(program, [torch.cat(rows)])
    tolerance = TOLERANCE.get(program.dtype, 1e-3)
    rounds_activations = any(OPS[name].rounds_activations for name in program.report.kernels)
    if rounds_activations or any(is_float8(spec.dtype) for spec in program.states):
        tolerance = max(tolerance, QUANTIZED_TOLERANCE)
    if not bool(torch.isfinite(alone).all()):
        return "inconclusive: the model's logits are not finite"
    if _distance(packed, alone) > tolerance:
        culprit = _first_difference(graph, program, rows, tolerance) if graph is not None else "an unknown node"
        raise TokenMixingError(
            f"two sequences packed into one batch change each other's logits by {_distance(packed, alone):.3g} of the"
            f" largest logit (at most {tolerance:.3g} is rounding). First seen at {culprit}. Something there mixes"
            " neighbouring tokens outside a known token mixer; make it an op with a cached twin (docs/adding-an-op.md)"
        )
    split = run_packed(program, rows[:1], first=rows[0][:SPLIT])
    difference = _distance(split, alone[SPLIT : LENGTHS[0]])
    if difference > tolerance:
        raise TokenMixingError(
            f"a sequence run in two steps gives other logits than in one, by {difference:.3g} of the largest (at most"
            f" {tolerance:.3g} is rounding): something in the model looks back at earlier tokens and no cache remembers"
            " them; make it an op with a cached twin (docs/adding-an-op.md)"
        )
    return "passed" if _distance(joined, alone) > tolerance else "inconclusive: joining the sequences changed nothing"


def check_apart(program: Program, row: Tensor, alone: Tensor) -> None:
    """The heart of `check_isolation` in two runs: a sequence packed with another, both over two steps, against alone.

    Args:
        row: token ids of a sequence. alone: its logits `[length, V]`, float32, when it is run whole and by itself.
    Raises:
        TokenMixingError: it gives other logits.
    """
    rows = [row.flip(0)[1:], row]
    states = fresh_states(program.states, rows, program.device)
    parts = []
    borders = [(0, 0), (1, SPLIT), (len(row) - 1, len(row))]  # the row's place differs from step to step
    for (first, second), (first_end, second_end) in itertools.pairwise(borders):
        step = [Span(0, first, first_end), Span(1, second, second_end)]
        logits = program.run(step_batch(program.states, rows, step, program.device), states).float().cpu()
        parts.append(logits[first_end - first :])
    difference = _distance(torch.cat(parts), alone)
    if difference > TOLERANCE.get(program.dtype, 1e-3):
        raise TokenMixingError(
            f"a sequence packed with another over two steps gives other logits than alone, by {difference:.3g} of the"
            " largest: something mixes neighbouring tokens, or remembers them outside any cache"
        )


def _distance(result: Tensor, expected: Tensor) -> float:
    if not expected.numel():
        return 0.0
    scale = expected.abs().max().clamp_min(1e-6)
    return float((result - expected).abs().max() / scale)


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps every node's value."""

    def __init__(self, module: fx.GraphModule):
        super().__init__(module, garbage_collect_values=False)
        self.values: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        self.values[n] = value.clone() if isinstance(value, Tensor) else value
        return value


@torch.inference_mode()
def _first_difference(graph: ModelGraph, program: Program, rows: list[Tensor], tolerance: float) -> str:
    """The first node whose rows of the second sequence differ between packed and alone."""
    recorders = []
    for case in (rows, rows[1:]):
        spans = [Span(index, 0, len(row)) for index, row in enumerate(case)]
        values = step_batch(program.states, case, spans, program.device)
        values |= fresh_states(program.states, case, program.device)
        recorder = _Recorder(graph.module)
        recorder.run(*[values[str(node.target)] for node in graph.inputs()])
        recorders.append(recorder.values)
    packed, alone = recorders
    for node in graph.graph.nodes:
        mine, other = packed[node], alone[node]
        dim = _token_dim(mine, other, rows)
        if node.op != "call_function" or dim is None or not mine.is_floating_point():
            continue
        if _distance(mine.narrow(dim, len(rows[0]), len(rows[1])).float(), other.float()) > tolerance:
            return f"{node.name} in module {module_path(node) or '(top)'} at {source_line(node)}"
    return "the output"


def _token_dim(packed: object, alone: object, rows: list[Tensor]) -> int | None:
    if not isinstance(packed, Tensor) or not isinstance(alone, Tensor) or packed.dim() != alone.dim():
        return None
    total, second = sum(map(len, rows)), len(rows[1])
    dims = [d for d in range(packed.dim()) if packed.shape[d] == total and alone.shape[d] == second]
    return dims[0] if len(dims) == 1 else None
