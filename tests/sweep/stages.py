"""One architecture through every stage: its name goes in, what each stage found comes out.

instantiate  transformers' class from a shrunken config; is it a decoder at all
eager        transformers' own code runs it on token ids
capture      torch.export traces it
graph        canonical, fused, cached and lowered: every token mixer one op, nothing refused
logits       (a) packed sequences give the logits that transformers gives each alone
generation   (b) chunked prefill, decode and preemption give transformers' greedy tokens
isolation    (c) packed sequences do not see each other, and a control shows that they could
compile      (d) Inductor gives what the plain graph gives
"""

import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from autodeploy.build import build
from autodeploy.compile.program import Program
from autodeploy.config import EngineOptions, Options, parse_options
from autodeploy.debug.isolation import check_isolation
from autodeploy.debug.packed_run import run_packed
from autodeploy.debug.shrink import shrink, tiny_model
from autodeploy.debug.shrink_sizes import SPECIAL_IDS, VOCAB_SIZE
from autodeploy.errors import TokenMixingError
from autodeploy.ops.op import OPS
from autodeploy.runtime.engine import Engine
from autodeploy.runtime.request import SamplingParams
from autodeploy.runtime.scheduler import ScheduledStep
from tests.sweep.architectures import config_of, why_no_decoder
from tests.sweep.reference import generated, greedy, logits_of

STAGES = ("instantiate", "eager", "capture", "graph", "logits", "generation", "isolation", "compile")
ROWS = (13, 1, 30, 6, 75)
"""lengths of packed sequences: shorter and longer than windows, chunks and blocks"""
PROMPTS = (1, 7, 19, 33)
NEW_TOKENS = 10
TOLERANCE = 5e-4
"""largest difference of a logit, as a share of the largest logit, that another order of float32 additions may cause"""
CROWDED = EngineOptions(max_num_batched_tokens=16, page_size=4, max_num_seqs=4)
PREEMPT_AT = (4, 9, 11)
"""steps after which the last running sequence loses its state"""

Result = dict[str, Any]
Save = Callable[[Result], None]


def examine(name: str, stages: tuple[str, ...] = STAGES, save: Save = lambda _: None) -> Result:
    """Run the stages of one architecture.

    Args:
        name: model type.
        stages: those to run.
        save: called with the result so far before every stage, so that a crash leaves a trace.
    Returns:
        `status` (`passed`, `failed`, `no decoder`, `does not run`), `reason`, per stage `ok`, `detail` and `seconds`,
        and facts of the model: class, layers, mixers by op.
    """
    result: Result = {"name": name, "status": "failed", "reason": "", "stages": {}, "mixers": {}}
    run = _Examination(name, result)
    for stage in STAGES:
        if stage not in stages:
            continue
        result["at"] = stage
        save(result)
        began = time.process_time()
        try:
            detail = getattr(run, stage)()
            found = {"ok": True, "detail": detail or ""}
        except Exception as error:
            found = {"ok": False, "detail": explain(error)}
        result["stages"][stage] = found | {"seconds": round(time.process_time() - began, 2)}
        if stage in ("instantiate", "eager") and result.get("no_decoder"):
            break
        if not found["ok"] and stage in ("instantiate", "eager", "capture", "graph"):
            break
    result.pop("at")
    _judge(result)
    save(result)
    return result


def _judge(result: Result) -> None:
    failed = [(stage, found["detail"]) for stage, found in result["stages"].items() if not found["ok"]]
    if result.get("no_decoder"):
        result["status"], result["reason"] = "no decoder", result["no_decoder"]
    elif failed:
        stage, detail = failed[0]
        result["status"] = "does not run" if stage in ("instantiate", "eager") else "failed"
        result["reason"] = f"{stage}: {detail}"
    else:
        result["status"] = "passed"


class Mismatch(Exception):
    """A stage ran and gave something else than the reference."""


class _Examination:
    """The stages; each raises with what is wrong, or returns a remark."""

    def __init__(self, name: str, result: Result):
        self.name, self.result = name, result
        self.model: PreTrainedModel
        self.program: Program
        generator = torch.Generator().manual_seed(len(name))
        self.rows, self.prompts = (
            [torch.randint(3, VOCAB_SIZE - SPECIAL_IDS, (length,), generator=generator) for length in lengths]
            for lengths in (ROWS, PROMPTS)
        )

    def instantiate(self) -> str:
        config = config_of(self.name)
        if config.is_encoder_decoder:
            self.result["no_decoder"] = why_no_decoder(None, config, self.rows[0])  # type: ignore[arg-type]
            return ""
        tiny = shrink(config)
        text = tiny.get_text_config()
        self.model = tiny_model(tiny)
        self.result |= {
            "class": type(self.model).__name__,
            "text_config": type(text).__name__,
            "is_composite": text is not tiny,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "layers": _layers(text),
        }
        return ""

    def eager(self) -> str:
        self.expected = [logits_of(self.model, row[None]) for row in self.rows]
        if not all(bool(logits.isfinite().all()) for logits in self.expected):
            raise Mismatch("transformers' own logits are not finite")
        if why := why_no_decoder(self.model, config_of(self.name), self.rows[0][None]):
            self.result["no_decoder"] = why
        return ""

    def capture(self) -> str:
        self.stage = ""
        self.failure: Exception | None = None
        try:
            self.program = build(self.model, _options(), progress=lambda stage: setattr(self, "stage", stage))
        except Exception as error:
            if "captur" in self.stage:
                raise
            self.failure = error
        return ""

    def graph(self) -> str:
        if self.failure is not None:
            raise self.failure
        report = self.program.report
        self.result["mixers"] = {
            name.removeprefix("cached_"): sum(providers.values())
            for name, providers in sorted(report.kernels.items())
            if name in OPS and OPS[name].mixes_tokens
        }
        self.result["experts"] = sum(report.kernels.get("moe", {}).values())
        self.result["nodes"] = {key: report.facts.get(key) for key in ("captured_nodes", "lowered_nodes")}
        self.result["states"] = sorted({f"{type(spec).__name__} {list(spec.shape)}" for spec in self.program.states})
        refused = [line for entry in report.transforms for line in entry.refused]
        if not self.result["mixers"]:
            raise Mismatch("no token mixer was found in a model that is one")
        return "; ".join(refused[:3])

    def logits(self) -> str:
        found = run_packed(self.program, self.rows)
        return self._compare(found, torch.cat(self.expected), "eager")

    def generation(self) -> str:
        tokens, num_preemptions = serve(self.program, self.prompts)
        remarks = [f"{num_preemptions} preemptions"]
        for at, prompt in enumerate(self.prompts):
            expected = greedy(self.model, prompt.tolist(), NEW_TOKENS)
            own = self._own_generate(prompt.tolist())
            if not isinstance(own, list) or not expected.agrees(own)[0]:
                what = own if isinstance(own, str) else "gives other tokens than a run of the whole sequence"
                remarks.append(f"generate itself {what}; compared with whole runs")
            is_same, needed_a_tie = expected.agrees(tokens[at])
            if not is_same:
                raise Mismatch(
                    f"prompt of {len(prompt)} tokens: generated {tokens[at]}, transformers {expected.tokens}"
                )
            if needed_a_tie:
                remarks.append("a tie")
        return "; ".join(dict.fromkeys(remarks))

    def isolation(self) -> str:
        try:
            verdict = check_isolation(self.program)
        except TokenMixingError:
            build(self.model, parse_options({"device": "cpu"}))  # knows the graph, and so the node at fault
            raise
        if verdict != "passed":
            raise Mismatch(verdict)
        return ""

    def compile(self) -> str:
        program = build(self.model, _options(compile_backend="torch-compile"))
        rows = self.rows[:4]
        return self._compare(run_packed(program, rows), run_packed(self.program, rows), "torch-simple")

    def _own_generate(self, prompt: list[int]) -> list[int] | str:
        try:
            return generated(self.model, prompt, NEW_TOKENS)
        except Exception as error:
            return f"raises {type(error).__name__}"

    def _compare(self, found: Tensor, expected: Tensor, against: str) -> str:
        error = float((found - expected).abs().max() / expected.abs().max())
        if not error <= TOLERANCE:
            raise Mismatch(f"logits differ from {against} by {error:.3g} of the largest (at most {TOLERANCE:g})")
        return f"{error:.1e}"


def _options(**values: Any) -> Options:
    return parse_options({"device": "cpu", "check_isolation": False, **values})


def _layers(text: Any) -> list[str]:
    """Kinds of the tiny model's layers as its config names them."""
    for name in ("layers_block_type", "layer_types"):
        kinds = getattr(text, name, None)
        if kinds:
            return [str(kind) for kind in kinds]
    return []


def serve(program: Program, prompts: list[Tensor]) -> tuple[list[list[int]], int]:
    """Tokens that the engine generates under crowding: short steps, small pages, sequences that lose their state."""
    engine = Engine(program, CROWDED, max_model_len=96)
    for at, prompt in enumerate(prompts):
        params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
        engine.add_request(str(at), prompt.tolist(), params)
    tokens: list[list[int]] = [[] for _ in prompts]
    for step in range(1000):
        if not engine.has_unfinished_requests():
            return tokens, engine.stats().num_preemptions
        for output in engine.step():
            tokens[int(output.request_id)].extend(output.token_ids)
        scheduler = engine._scheduler
        if step in PREEMPT_AT and len(scheduler.running) > 1:
            scheduler._make_room(scheduler.running[0], ScheduledStep())  # as if its pages were needed
    raise Mismatch("the engine does not come to an end")


def explain(error: Exception) -> str:
    """The error in one line, with the last line of code outside torch that it came through."""
    text = " ".join(str(error).split())[:500]
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "/torch/" not in frame.filename] or list(frames)
    place = "" if isinstance(error, Mismatch) else f" [{Path(own[-1].filename).name}:{own[-1].lineno}]"
    if isinstance(error, TokenMixingError):
        place = ""
    return f"{type(error).__name__}: {text}{place}"
