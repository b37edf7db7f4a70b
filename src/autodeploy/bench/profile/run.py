"""A profile: a watched engine and a load go in; `trace.json`, `profile.txt` and `profile.json` come out.

A wave of requests is served three times: once so that everything is compiled, once for times without a profiler, once
under it. The steps of the last are then run again op by op, on the same inputs and states. On a CPU an op's time is how
long its call kept the thread, without a profiler; on CUDA how long what it launched kept the device, from the trace.
"""

import dataclasses
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch.profiler import ProfilerActivity, record_function
from torch.profiler import profile as torch_profile

from autodeploy.bench import record
from autodeploy.bench.machine import MachineLimits, synchronize
from autodeploy.bench.profile.table import Phase, make_rows, show
from autodeploy.bench.profile.timeline import Span, timeline
from autodeploy.bench.profile.trace import Range, Trace, coverage, read_trace
from autodeploy.bench.profile.watch import STEP, ServedStep, Watch
from autodeploy.config import Options
from autodeploy.errors import ConfigError
from autodeploy.runtime.engine import Engine
from autodeploy.runtime.request import SamplingParams

WARM_STEPS = 3
"""Decode steps that are not counted: what repeats steps writes them down, what overlaps them fills its pipeline."""
DECODE_STEPS = 8
REPEATS = 5
NUM_TOKENS = WARM_STEPS + DECODE_STEPS + 4
"""Tokens that a request of a wave generates at least."""
PHASES = ("prefill", "decode")
TEXT_WIDTH = 140


@dataclass(frozen=True)
class Wave:
    """One wave.

    Attributes:
        prefills: steps that compute prompts, with their inputs, and wall seconds of each.
        decodes: counted decode steps.
        decode_seconds: wall seconds of one.
        last: one more, with its inputs.
    """

    prefills: list[tuple[ServedStep, float]]
    decodes: list[ServedStep]
    decode_seconds: float
    last: ServedStep

    @property
    def largest(self) -> tuple[ServedStep, float]:
        """The first prefill of the most tokens."""
        return max(self.prefills, key=lambda entry: entry[0].size.tokens)

    def step(self, phase: str) -> ServedStep:
        """The step that stands for a phase."""
        return self.largest[0] if phase == "prefill" else self.last


def checked(options: Options) -> Options:
    """Options for a build that is to be profiled: costs are told by symbolic sizes, which a kept graph has not.

    Raises:
        ConfigError: options under which steps are not plain ones.
    """
    if options.engine.speculative_config is not None:
        raise ConfigError("a profile is of steps without drafts; leave speculative_config out")
    return dataclasses.replace(options, compile=dataclasses.replace(options.compile, graph_cache=False))


def profile_steps(
    watch: Watch,
    engine: Engine,
    options: Options,
    limits: MachineLimits,
    folder: Path,
    *,
    num_seqs: int,
    input_len: int,
    arguments: Mapping[str, Any],
) -> list[Phase]:
    """Profile prefill and decode steps of an engine without requests; print the tables and write the files.

    Args:
        watch: has built the engine's program.
        folder: where files go; made where it is missing.
        num_seqs: requests of a wave.
        input_len: tokens of each prompt.
        arguments: for the record.

    Raises:
        ConfigError: a wave that the engine cannot hold, or no kernels in the trace of a device.
    """
    if input_len + NUM_TOKENS > engine.max_model_len:
        raise ConfigError(
            f"a profile needs {NUM_TOKENS} tokens behind the prompt: {input_len} + {NUM_TOKENS} are more than "
            f"max_model_len, {engine.max_model_len}; shorten input_len"
        )
    if input_len < 2 or num_seqs < 1:
        raise ConfigError(f"a profile needs input_len >= 2 and a sequence; got {input_len} and {num_seqs}")
    folder.mkdir(parents=True, exist_ok=True)
    waves = _Waves(watch, engine, num_seqs, input_len)
    on_cpu = engine.program.device.type == "cpu"
    with waves.served():
        pass
    with waves.served() as timed:
        seconds = {name: watch.ops.medians(timed.step(name).inputs, REPEATS) for name in PHASES if on_cpu}
    profiler = torch_profile(activities=[ProfilerActivity.CPU] + ([] if on_cpu else [ProfilerActivity.CUDA]))
    with profiler, waves.served() as traced:
        for name in PHASES:
            for _ in range(1 if on_cpu else REPEATS):
                with record_function(f"{name}, op by op"):
                    watch.ops.run(traced.step(name).inputs)
        synchronize(engine.program.device)
    profiler.export_chrome_trace(str(folder / "trace.json"))
    trace = read_trace(folder / "trace.json")
    if not on_cpu:
        if not trace.work:
            raise ConfigError("the profiler saw no kernels on the device; CUPTI must be usable by this process")
        seconds = _device_seconds(watch, trace)
    phases = [_phase(name, watch, seconds[name], timed, traced, trace, limits) for name in PHASES]
    _write(folder, phases, engine, options, limits, arguments)
    return phases


class _Waves:
    """Waves of requests, each with prompts of its own."""

    def __init__(self, watch: Watch, engine: Engine, num_seqs: int, input_len: int) -> None:
        self._watch, self._engine, self._num_seqs, self._input_len = watch, engine, num_seqs, input_len
        self._count = 0

    @contextmanager
    def served(self) -> Iterator[Wave]:
        """Prompts computed and some tokens generated; the sequences keep their states until this ends."""
        self._count += 1
        names = [f"profile-{self._count}-{index}" for index in range(self._num_seqs)]
        longest = self._engine.max_model_len - self._input_len  # none may end while prompts of others are computed
        params = SamplingParams(max_tokens=longest, temperature=0.0, ignore_eos=True)
        for index, name in enumerate(names):
            seed = 1_000_000 * self._count + index
            vocab_size = self._engine.program.vocab_size
            ids = torch.randint(vocab_size, (self._input_len,), generator=torch.Generator().manual_seed(seed))
            self._engine.add_request(name, ids.tolist(), params)
        self._watch.steps.clear()
        self._watch.is_recording = True
        try:
            yield self._run()
        finally:
            self._watch.is_recording = self._watch.is_copying = False
            for name in names:
                self._engine.abort_request(name)
            while self._engine.has_unfinished_requests():
                self._engine.step()

    def _run(self) -> Wave:
        watch = self._watch
        prefills: list[tuple[ServedStep, float]] = []
        watch.is_copying = True
        while True:
            seconds = self._timed(1)
            if watch.steps[-1].decodes:
                break
            prefills.append((watch.steps[-1], seconds))
        watch.is_copying = False
        self._timed(WARM_STEPS)
        begin = len(watch.steps)
        decode_seconds = self._timed(DECODE_STEPS) / DECODE_STEPS
        decodes = watch.steps[begin:]
        watch.is_copying = True
        self._timed(1)
        return Wave(prefills, decodes, decode_seconds, watch.steps[-1])

    def _timed(self, num_steps: int) -> float:
        """Seconds of some steps, from an idle device to an idle device."""
        device = self._engine.program.device
        synchronize(device)
        begin = time.perf_counter()
        for _ in range(num_steps):
            self._engine.step()
        synchronize(device)
        return time.perf_counter() - begin


def _device_seconds(watch: Watch, trace: Trace) -> dict[str, dict[str, float]]:
    """By phase and call: what it kept the device busy for, the median of all but the first run."""
    names = {call.label: call.name for call in watch.ops.calls}
    seconds = trace.device_seconds(list(names))
    samples = {names[label]: values for label, values in seconds.items()}
    return {
        "prefill": {name: statistics.median(values[1:REPEATS]) for name, values in samples.items()},
        "decode": {name: statistics.median(values[REPEATS + 1 :]) for name, values in samples.items()},
    }


def _phase(
    name: str,
    watch: Watch,
    seconds: Mapping[str, float],
    timed: Wave,
    traced: Wave,
    trace: Trace,
    limits: MachineLimits,
) -> Phase:
    """Times without a profiler where the host's clock tells them; the rest from the trace."""
    rows = make_rows(watch.ops.calls, seconds, traced.step(name).size, limits)
    ranges = _ranges(name, traced, trace)
    steps = timed.decodes if name == "decode" else [step for step, _ in timed.prefills]
    spans = [Span(step.begin, step.end, index) for index, step in enumerate(steps)]
    return Phase(
        name=name,
        step=traced.step(name).size,
        served_seconds=timed.decode_seconds if name == "decode" else timed.largest[1],
        ops_seconds=sum(row.seconds for row in rows),
        limit_seconds=sum(row.limit_seconds for row in rows),
        rows=rows,
        timeline=timeline(trace.device_spans(ranges) if trace.work else spans),
        on_device=bool(trace.work),
        coverage=coverage(trace, ranges),
    )


def _ranges(name: str, traced: Wave, trace: Trace) -> list[Range]:
    """The ranges of a phase's steps in the trace, which has those of all steps of the wave in order."""
    steps = trace.named(STEP)
    if name == "prefill":
        return steps[: len(traced.prefills)]
    first = len(traced.prefills) + 1 + WARM_STEPS
    return steps[first : first + DECODE_STEPS]


def _write(
    folder: Path,
    phases: Sequence[Phase],
    engine: Engine,
    options: Options,
    limits: MachineLimits,
    arguments: Mapping[str, Any],
) -> None:
    program = engine.program
    shown = Console()
    show(phases, limits, program.report, shown if shown.is_terminal else Console(width=TEXT_WIDTH))
    with (folder / "profile.txt").open("w", encoding="utf-8") as file:
        show(phases, limits, program.report, Console(file=file, width=TEXT_WIDTH))
    record.write(
        folder / "profile.json",
        benchmark="profile",
        arguments=arguments,
        options=options,
        program=program,
        limits=limits,
        results={phase.name: dataclasses.asdict(phase) for phase in phases},
        samples={},
    )
    Console(highlight=False).print(
        f"{folder / 'trace.json'} opens in ui.perfetto.dev or chrome://tracing", markup=False
    )
