"""Our side: a model is built once; each figure is a function of the engine, and gives numbers for the record."""

import dataclasses
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from autodeploy.bench.latency import one_request, random_prompt, state_bytes_read
from autodeploy.bench.machine import MachineLimits, measure, synchronize
from autodeploy.bench.profile.run import checked, profile_steps
from autodeploy.bench.profile.watch import Watch
from autodeploy.bench.throughput import random_requests, serve
from autodeploy.build import build
from autodeploy.config import Options, parse_options
from autodeploy.runtime.engine import Engine
from autodeploy.runtime.request import SamplingParams
from gpu import models

Figures = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Load:
    """What is asked of a model: real sizes, or tiny ones to try the script.

    Attributes:
        single: tokens in and out of one request.
        many: requests at once, tokens in and out of each.
        batches: sequences of the profiled steps; each has as many tokens as a single request.
        long_seqs, long: sequences whose decode steps are timed, and the tokens in and out that rates are told for.
    """

    single: tuple[int, int] = (1024, 1024)
    repeats: int = 2
    many: tuple[int, int, int] = (512, 1024, 1024)
    batches: tuple[int, ...] = (1, 64)
    long_seqs: int = 64
    long: tuple[int, int] = (8192, 16384)
    long_steps: int = 32
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    max_model_len: int = 25_600


SMOKE = Load(
    single=(12, 6), repeats=1, many=(3, 8, 4), batches=(1, 2), long_seqs=2, long=(8, 16), long_steps=2, max_num_seqs=4,
    max_num_batched_tokens=64, max_model_len=128,
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Built:
    """A model that serves."""

    watch: Watch
    engine: Engine
    options: Options
    limits: MachineLimits
    load: Load
    profiles: Path


def options_of(precision: str, load: Load, *, smoke: bool) -> Options:
    """Options of a build in a precision: `bf16`, or a `quantization` by its name."""
    values: dict[str, Any] = {"load_format": "dummy", "skip_tokenizer_init": True, "check_isolation": False}
    values |= {"max_num_seqs": load.max_num_seqs, "max_num_batched_tokens": load.max_num_batched_tokens}
    values |= {"max_model_len": load.max_model_len, "enable_prefix_caching": False}
    values |= {"max_queued_requests": 4096, "instant_on": False}
    if precision != "bf16":
        values["quantization"] = precision
    values |= {"kv_cache_memory_bytes": 2**24} if smoke else {"memory_fraction": 0.8}
    return parse_options(values)


def built(name: str, precision: str, folder: Path, profiles: Path, *, smoke: bool) -> tuple[Built, Figures]:
    """Build a model and measure the device; what the build took and found."""
    load = SMOKE if smoke else Load()
    watch, options = Watch(), checked(options_of(precision, load, smoke=smoke))
    start = time.perf_counter()
    program = watch.build(models.subject(name, folder, smoke=smoke), options)
    seconds = time.perf_counter() - start
    limits = measure(program.device, program.dtype)  # before the states take the memory that this needs
    if program.device.type == "cuda":
        torch.cuda.empty_cache()
    start = time.perf_counter()
    engine = Engine(program, options.engine, options.model.max_model_len)
    seconds += time.perf_counter() - start
    report = program.report
    figures = {"seconds": seconds, "stages": report.seconds, "kernels": report.kernels, "facts": report.facts}
    made = Built(watch=watch, engine=engine, options=options, limits=limits, load=load, profiles=profiles)
    return made, figures | {"limits": dataclasses.asdict(limits), "max_model_len": engine.max_model_len}


def single(made: Built) -> Figures:
    """One request at a time: tokens per second, and the share of the copy rate that this reads."""
    engine, (input_len, output_len) = made.engine, made.load.single
    prompts = [random_prompt(engine.program.vocab_size, input_len, seed) for seed in range(made.load.repeats + 1)]
    times = [one_request(engine, f"single-{i}", prompt, output_len) for i, prompt in enumerate(prompts)]
    per_token = statistics.median((each[-1] - each[0]) / (len(each) - 1) for each in times[1:])
    step_bytes = engine.program.step_weight_bytes + state_bytes_read(engine.program, input_len + output_len // 2)
    rate = step_bytes / per_token / 1e9
    return {
        "first_request_seconds": times[0][-1],
        "time_to_first_token": statistics.median(each[0] for each in times[1:]),
        "tokens_per_second": 1 / per_token,
        "gb_per_second": rate,
        "memory_share": rate / made.limits.memory_gb_per_second,
    }


def throughput(made: Built) -> Figures:
    """Many requests at once: output tokens per second, prompts included in the time."""
    count, input_len, output_len = made.load.many
    requests = random_requests(made.engine.program.vocab_size, count, (input_len, input_len), (output_len, output_len))
    served = serve(made.engine, requests, made.options.engine.max_queued_requests)
    seconds = sum(served.seconds)
    return {
        "seconds": seconds,
        "output_tokens_per_second": sum(served.tokens) / seconds,
        "mean_batch": sum(served.batch) / len(served.batch),
        "steps": len(served.seconds),
        "preemptions": made.engine.stats().num_preemptions,
    }


def profile(made: Built) -> Figures:
    """Steps of few and of many sequences: idle gaps, ops against the device's limits, graph coverage."""
    figures = {}
    for num_seqs in made.load.batches:
        folder = made.profiles / f"batch-{num_seqs}"
        load = {"num_seqs": num_seqs, "input_len": made.load.single[0]}
        phases = profile_steps(made.watch, made.engine, made.options, made.limits, folder, **load, arguments=load)
        figures[f"batch_{num_seqs}"] = {phase.name: dataclasses.asdict(phase) for phase in phases}
    return figures


def long(made: Built) -> Figures:
    """Steps of many sequences at three contexts, from the tokens in to all tokens; the rate that follows from these."""
    (input_len, output_len), load = made.load.long, made.load
    # The first sequences go on while the prompts of others are computed, and must not reach their end.
    steps_of_prompts = load.long_seqs * (input_len + output_len) // load.max_num_batched_tokens + load.long_seqs
    last = input_len + output_len - load.long_steps - steps_of_prompts
    steps, prefill_seconds = {}, 0.0
    for context in (input_len, (input_len + last) // 2, last):
        seconds, steps[context] = _steps_at(made, context)
        prefill_seconds = prefill_seconds or seconds
    whole = prefill_seconds + output_len * statistics.fmean(steps.values())
    return {
        "sequences": load.long_seqs,
        "prefill_seconds": prefill_seconds,
        "step_seconds": {str(context): seconds for context, seconds in steps.items()},
        "output_tokens_per_second": load.long_seqs * output_len / whole,
    }


def _steps_at(made: Built, context: int) -> tuple[float, float]:
    """Seconds until prompts of so many tokens all have their first token, and of a decode step after that."""
    engine, device = made.engine, made.engine.program.device
    params = SamplingParams(max_tokens=engine.max_model_len - context, temperature=0.0, ignore_eos=True)
    waiting = {f"long-{context}-{index}" for index in range(made.load.long_seqs)}
    start = time.perf_counter()
    for seed, name in enumerate(sorted(waiting)):
        engine.add_request(name, random_prompt(engine.program.vocab_size, context, seed), params)
    names = list(waiting)
    while waiting:
        waiting -= {output.request_id for output in engine.step() if output.token_ids}
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(made.load.long_steps):
        engine.step()
    synchronize(device)
    end = time.perf_counter()
    for name in names:
        engine.abort_request(name)
    return begin - start, (end - begin) / made.load.long_steps


def first_token(name: str, precision: str, folder: Path, *, smoke: bool) -> Figures:
    """A build as a user's, and one token: what is kept of an earlier one is used."""
    options = options_of(precision, SMOKE if smoke else Load(), smoke=smoke)
    program = build(models.subject(name, folder, smoke=smoke), options)
    engine = Engine(program, options.engine, options.model.max_model_len)
    one_request(engine, "first", random_prompt(program.vocab_size, 16, 0), 1)
    return {"stages": program.report.seconds}


FIGURES: dict[str, Callable[[Built], Figures]] = {
    "single": single,
    "profile": profile,
    "throughput": throughput,
    "long": long,
}
