"""One request at a time: a model and two lengths in; time to first and per output token, share of limits out."""

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
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
from autodeploy.ops.state import PagedState
from autodeploy.runtime.engine import Engine
from autodeploy.runtime.request import SamplingParams


@dataclass(frozen=True, kw_only=True)
class LatencyResult:
    """Medians over the measured requests; every time in seconds.

    Attributes:
        build_seconds: from the call of `build` to a program that is ready.
        first_request_seconds: the unmeasured first request, whole: what compiles lazily shows here.
        time_to_first_token: from adding the request to its first token.
        time_per_output_token: mean distance of the tokens after the first.
        prefill_tokens_per_second: prompt tokens over the time to first token.
        decode_tokens_per_second: one over the time per output token.
        decode_gb_per_second: weights and states that a decode step must read, over its time.
        prefill_gflop_per_second: operations of the matrix products over the time to first token.
        memory_share: `decode_gb_per_second` over the machine's measured limit.
        matmul_share: `prefill_gflop_per_second` over the machine's measured limit.
    """

    build_seconds: float
    first_request_seconds: float
    time_to_first_token: float
    time_per_output_token: float
    prefill_tokens_per_second: float
    decode_tokens_per_second: float
    decode_gb_per_second: float
    prefill_gflop_per_second: float
    memory_share: float
    matmul_share: float


def run(
    model: str | nn.Module,
    options: Options | None = None,
    *,
    input_len: int = 128,
    output_len: int = 64,
    repeats: int = 5,
    json_path: Path | None = None,
    profile: Path | None = None,
) -> LatencyResult:
    """Measure single requests of random tokens, print a table, and write JSON where asked to.

    Args:
        model: as for `build`.
        options: as for `build`.
        input_len: tokens per prompt.
        output_len: tokens generated per request, at least 2.
        repeats: measured requests, each with its own prompt.
        json_path: where the record goes.
        profile: folder for a profile of the same steps, taken afterwards (`bench/profile`).

    Raises:
        ConfigError: lengths or repeats that measure nothing.
    """
    if input_len < 1 or output_len < 2 or repeats < 1:
        raise ConfigError(
            f"latency needs input_len >= 1, output_len >= 2 and repeats >= 1; got {input_len}, {output_len}, {repeats}"
        )
    options = options or Options()
    watch = None
    if profile is not None:
        watch, options = Watch(), checked(options)
    start = time.perf_counter()
    program = build(model, options) if watch is None else watch.build(model, options)
    engine = Engine(program, options.engine, options.model.max_model_len)
    build_seconds = time.perf_counter() - start
    requests = [
        one_request(engine, f"latency-{index}", random_prompt(program.vocab_size, input_len, index), output_len)
        for index in range(repeats + 1)
    ]
    limits = measure(program.device, program.dtype)
    result = _summarise(program, limits, requests, build_seconds, input_len, output_len)
    Console().print(_table(result, limits, f"{input_len} tokens in, {output_len} out, median of {repeats}"))
    arguments = {"model": str(model), "input_len": input_len, "output_len": output_len, "repeats": repeats}
    if json_path is not None:
        record.write(
            json_path,
            benchmark="latency",
            arguments=arguments,
            options=options,
            program=program,
            limits=limits,
            results=vars(result),
            samples={"token_seconds": requests},
        )
    if watch is not None and profile is not None:
        wave = {"num_seqs": 1, "input_len": input_len}
        profile_steps(watch, engine, options, limits, profile, **wave, arguments=arguments)
    return result


def state_bytes_read(program: Program, context: int) -> int:
    """Bytes of state that a decode step with `context` tokens reads: pages within the window, slots whole."""
    total = 0
    for spec in program.states:
        if isinstance(spec, PagedState):
            total += spec.bytes_per_token * min(context, spec.window or context)
        else:
            total += spec.bytes_per_slot
    return total


def random_prompt(vocab_size: int, length: int, seed: int) -> list[int]:
    """Random ids, different for every seed: a repeated prompt could be answered from a cache."""
    ids: list[int] = torch.randint(0, vocab_size, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    return ids


def one_request(engine: Engine, request_id: str, prompt: Sequence[int], output_len: int) -> list[float]:
    """Seconds from adding the request to each of its tokens."""
    params = SamplingParams(max_tokens=output_len, temperature=0.0, ignore_eos=True)
    times: list[float] = []
    start = time.perf_counter()
    engine.add_request(request_id, prompt, params)
    while engine.has_unfinished_requests():
        for output in engine.step():
            times += [time.perf_counter() - start] * len(output.token_ids)
    return times


def _summarise(
    program: Program,
    limits: MachineLimits,
    requests: Sequence[Sequence[float]],
    build_seconds: float,
    input_len: int,
    output_len: int,
) -> LatencyResult:
    warm_up, measured = requests[0], requests[1:]
    first = statistics.median(times[0] for times in measured)
    per_token = statistics.median((times[-1] - times[0]) / (len(times) - 1) for times in measured)
    step_bytes = program.step_weight_bytes + state_bytes_read(program, input_len + output_len // 2)
    decode_rate = step_bytes / per_token / 1e9
    prefill_rate = (program.flops_per_token * input_len + program.flops_per_logits_row) / first / 1e9
    return LatencyResult(
        build_seconds=build_seconds,
        first_request_seconds=warm_up[-1],
        time_to_first_token=first,
        time_per_output_token=per_token,
        prefill_tokens_per_second=input_len / first,
        decode_tokens_per_second=1 / per_token,
        decode_gb_per_second=decode_rate,
        prefill_gflop_per_second=prefill_rate,
        memory_share=decode_rate / limits.memory_gb_per_second,
        matmul_share=prefill_rate / limits.matmul_gflop_per_second,
    )


def _table(result: LatencyResult, limits: MachineLimits, title: str) -> Table:
    table = Table("", "measured", "machine's limit", "share", title=title)
    table.add_row("build", f"{result.build_seconds:.2f} s", "", "")
    table.add_row("first request", f"{result.first_request_seconds:.2f} s", "", "")
    table.add_row("time to first token", f"{result.time_to_first_token * 1e3:.1f} ms", "", "")
    table.add_row("time per output token", f"{result.time_per_output_token * 1e3:.2f} ms", "", "")
    table.add_row("prefill", f"{result.prefill_tokens_per_second:.0f} tokens/s", "", "")
    table.add_row("decode", f"{result.decode_tokens_per_second:.1f} tokens/s", "", "")
    memory, matmul = limits.memory_gb_per_second, limits.matmul_gflop_per_second
    table.add_row(
        "decode reads", f"{result.decode_gb_per_second:.1f} GB/s", f"{memory:.1f} GB/s", f"{result.memory_share:.0%}"
    )
    table.add_row(
        "prefill computes",
        f"{result.prefill_gflop_per_second:.0f} GFLOP/s",
        f"{matmul:.0f} GFLOP/s",
        f"{result.matmul_share:.0%}",
    )
    return table
