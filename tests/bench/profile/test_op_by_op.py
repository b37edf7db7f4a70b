"""OpByOp: run one by one, a graph's calls give what the program gives, each is timed, and weights are counted once."""

import pytest
import torch

from autodeploy.bench.profile.op_by_op import OpByOp
from autodeploy.build import build
from autodeploy.config import parse_options
from autodeploy.debug.packed_run import Span, fresh_states, step_batch
from autodeploy.graph.model_graph import ModelGraph
from tests import tiny


@pytest.mark.parametrize(("name", "backend"), [("gpt_oss", "torch-simple"), ("bamba", "auto")])
def test_same_logits_as_the_program(name: str, backend: str) -> None:
    kept: list[OpByOp] = []

    def keep(graph: ModelGraph) -> None:
        kept.append(OpByOp(graph))

    model = (tiny.TINY | tiny.HYBRID)[name]()
    options = parse_options({"compile_backend": backend, "device": "cpu", "check_isolation": False})
    program = build(model, options, lowered=keep)
    (ops,) = kept
    rows = [torch.tensor(prompt) for prompt in tiny.prompts(2, shortest=5, longest=9)]
    spans = [Span(index, 0, len(row)) for index, row in enumerate(rows)]
    batch = step_batch(program.states, rows, spans, program.device)
    logits, seconds = ops.run(batch | fresh_states(program.states, rows, program.device))
    expected = program.run(batch, fresh_states(program.states, rows, program.device))
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)

    assert seconds.keys() == {call.name for call in ops.calls}
    assert min(seconds.values()) > 0
    medians = ops.medians(batch | fresh_states(program.states, rows, program.device), repeats=3)
    assert medians.keys() == seconds.keys()
    chosen = {op: set(providers) for op, providers in program.report.kernels.items() if op != "choose_tokens"}
    assert {op: {c.provider for c in ops.calls if c.op == op} for op in chosen} == chosen


def test_every_weight_is_read_by_one_call() -> None:
    kept: list[OpByOp] = []
    model = tiny.llama()
    build(model, parse_options({"device": "cpu"}), lowered=lambda graph: kept.append(OpByOp(graph)))
    calls = kept[0].calls
    tables = sum(p.nbytes for name, p in model.named_parameters() if "embed_tokens" in name)  # only rows of it are read
    assert sum(call.cost.weight_bytes for call in calls) == sum(p.nbytes for p in model.parameters()) - tables
    assert len({call.label for call in calls}) == len(calls)
    head = next(call for call in calls if call.op == "linear" and call.weights == f"{tiny.VOCAB_SIZE}x{tiny.HIDDEN}")
    assert head.cost.flops_per_row == 2 * tiny.VOCAB_SIZE * tiny.HIDDEN
