"""Many requests at once: a model and a load in; requests and tokens per second out."""

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table
from torch import nn

from autodeploy.bench import record
from autodeploy.bench.machine import MachineLimits, measure
from autodeploy.bench.profile.run import checked, profile_steps
from autodeploy.bench.profile.watch import Watch
from autodeploy.build import build
from autodeploy.compile.program import Program
from autodeploy.config import Options
from autodeploy.errors import ConfigError
from autodeploy.runtime.engine import Engine
from autodeploy.runtime.request import SamplingParams

Requests = Sequence[tuple[list[int], int]]
"""Prompts of random ids, and how many tokens each is to generate."""


@dataclass(frozen=True, kw_only=True)
class ThroughputResult:
    """Rates over the whole run, from the first request added to the last token.

    Attributes:
        build_seconds: from the call of `build` to an engine that is ready.
        seconds: the run itself.
        mean_batch: sequences running per step, on average over steps.
        num_preemptions: sequences put back because memory for states ran out.
        gflop_per_second: operations of the matrix products over the run.
        matmul_share: `gflop_per_second` over the machine's measured limit.
    """

    build_seconds: float
    seconds: float
    requests_per_second: float
    output_tokens_per_second: float
    total_tokens_per_second: float
    mean_batch: float
    num_steps: int
    num_preemptions: int
    gflop_per_second: float
    matmul_share: float


@dataclass
class Load:
    """What was measured while the requests ran: seconds, batch and tokens of each step."""

    seconds: list[float] = field(default_factory=list)
    batch: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)


def run(
    model: str | nn.Module,
    options: Options | None = None,
    *,
    num_prompts: int = 32,
    input_len: tuple[int, int] = (32, 512),
    output_len: tuple[int, int] = (64, 128),
    json_path: Path | None = None,
    profile: Path | None = None,
) -> ThroughputResult:
    """Serve random requests, all waiting from the start; print a table, and write JSON where asked to.

    Args:
        model: as for `build`.
        options: as for `build`.
        num_prompts: requests, each with its own prompt.
        input_len: fewest and most tokens of a prompt, drawn evenly.
        output_len: fewest and most tokens generated per request, drawn evenly.
        json_path: where the record goes.
        profile: folder for a profile of a full batch, taken afterwards (`bench/profile`).

    Raises:
        ConfigError: a load with nothing to do.
    """
    _check_load(num_prompts, input_len, output_len)
    options = options or Options()
    watch = None
    if profile is not None:
        watch, options = Watch(), checked(options)
    start = time.perf_counter()
    program = build(model, options) if watch is None else watch.build(model, options)
    engine = Engine(program, options.engine, options.model.max_model_len)
    build_seconds = time.perf_counter() - start
    requests = random_requests(program.vocab_size, num_prompts, input_len, output_len)
    serve(engine, requests[:1], options.engine.max_queued_requests)  # what compiles lazily does so here
    load = serve(engine, requests, options.engine.max_queued_requests)
    limits = measure(program.device, program.dtype)
    result = _summarise(program, limits, requests, load, build_seconds, engine.stats().num_preemptions)
    Console().print(_table(result, f"{num_prompts} requests, {_num_input(requests)} tokens in, {sum(load.tokens)} out"))
    arguments = {"model": str(model), "num_prompts": num_prompts, "input_len": input_len, "output_len": output_len}
    if json_path is not None:
        record.write(
            json_path,
            benchmark="throughput",
            arguments=arguments,
            options=options,
            program=program,
            limits=limits,
            results=vars(result),
            samples={"step_seconds": load.seconds, "step_batch": load.batch, "step_tokens": load.tokens},
        )
    if watch is not None and profile is not None:
        num_seqs = min(num_prompts, options.engine.max_num_seqs, options.engine.max_queued_requests)
        wave = {"num_seqs": num_seqs, "input_len": sum(input_len) // 2}
        profile_steps(watch, engine, options, limits, profile, **wave, arguments=arguments)
    return result


def _check_load(num_prompts: int, input_len: tuple[int, int], output_len: tuple[int, int]) -> None:
    for name, (low, high) in (("input_len", input_len), ("output_len", output_len)):
        if not 1 <= low <= high:
            raise ConfigError(f"{name} must be a range of at least 1 token, fewest first; got {low}, {high}")
    if num_prompts < 1:
        raise ConfigError(f"num_prompts must be at least 1, got {num_prompts}")


def _num_input(requests: Requests) -> int:
    return sum(len(prompt) for prompt, _ in requests)


def _summarise(
    program: Program,
    limits: MachineLimits,
    requests: Requests,
    load: Load,
    build_seconds: float,
    num_preemptions: int,
) -> ThroughputResult:
    seconds, num_output = sum(load.seconds), sum(load.tokens)
    num_tokens = _num_input(requests) + num_output
    flops = program.flops_per_token * num_tokens + program.flops_per_logits_row * num_output
    gflop_rate = flops / seconds / 1e9
    return ThroughputResult(
        build_seconds=build_seconds,
        seconds=seconds,
        requests_per_second=len(requests) / seconds,
        output_tokens_per_second=num_output / seconds,
        total_tokens_per_second=num_tokens / seconds,
        mean_batch=sum(load.batch) / len(load.batch),
        num_steps=len(load.seconds),
        num_preemptions=num_preemptions,
        gflop_per_second=gflop_rate,
        matmul_share=gflop_rate / limits.matmul_gflop_per_second,
    )


def random_requests(vocab_size: int, count: int, input_len: tuple[int, int], output_len: tuple[int, int]) -> Requests:
    """The same on every run."""
    source = random.Random(0)
    return [
        ([source.randrange(vocab_size) for _ in range(source.randint(*input_len))], source.randint(*output_len))
        for _ in range(count)
    ]


def serve(engine: Engine, requests: Requests, max_queued: int) -> Load:
    """Run all requests to their end, keeping the queue as full as it may be."""
    load, waiting = Load(), list(enumerate(requests))
    while waiting or engine.has_unfinished_requests():
        start = time.perf_counter()
        while waiting and engine.stats().num_waiting < max_queued:
            index, (prompt, length) = waiting.pop(0)
            params = SamplingParams(max_tokens=length, temperature=0.0, ignore_eos=True)
            engine.add_request(f"throughput-{index}", prompt, params)
        outputs = engine.step()
        load.seconds.append(time.perf_counter() - start)
        # A sequence that finished in this step was part of its batch, but no longer counts as running.
        finished = sum(output.finish_reason is not None for output in outputs)
        load.batch.append(engine.stats().num_running + finished)
        load.tokens.append(sum(len(output.token_ids) for output in outputs))
    return load


def _table(result: ThroughputResult, title: str) -> Table:
    table = Table("", "measured", title=title)
    table.add_row("build", f"{result.build_seconds:.2f} s")
    table.add_row("run", f"{result.seconds:.2f} s in {result.num_steps} steps")
    table.add_row("requests", f"{result.requests_per_second:.2f} /s")
    table.add_row("output", f"{result.output_tokens_per_second:.1f} tokens/s")
    table.add_row("input and output", f"{result.total_tokens_per_second:.1f} tokens/s")
    table.add_row("mean batch", f"{result.mean_batch:.1f} sequences, {result.num_preemptions} preemptions")
    table.add_row("matrix products", f"{result.gflop_per_second:.0f} GFLOP/s, {result.matmul_share:.0%} of the limit")
    return table
