"""A profiler's trace goes in, in Chrome's format; out comes what a device did, for whom, and from a graph or not.

A kernel has the correlation number of the call that launched it: of a launch of its own, or of a whole CUDA graph's.
That call lies within a range of the thread that made it: a served step, or one call of a graph. Where the call itself
was not recorded, the kernel's external number names the operator or range that it was made in.
"""

import json
import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from autodeploy.bench.profile.timeline import Span
from autodeploy.compile.replay import REPEATED

_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_LAUNCHES = ("cuda_runtime", "cuda_driver")
_CALLERS = ("cpu_op", "user_annotation")
_NUM_CALLS = re.compile(rf"{REPEATED}: (\d+) native calls, (\d+) others")


@dataclass(frozen=True)
class Range:
    """A named stretch of a thread's time, in seconds."""

    name: str
    thread: object
    begin: float
    end: float


@dataclass(frozen=True)
class Work:
    """A kernel or copy on the device.

    Attributes:
        launched: when the call that launched it was made, and on which thread; None where the trace does not tell.
        is_from_graph: whether that call launched a CUDA graph.
    """

    name: str
    begin: float
    end: float
    launched: tuple[float, object] | None
    is_from_graph: bool


@dataclass(frozen=True)
class Trace:
    """Ranges and device work, each in order of begin."""

    ranges: Sequence[Range]
    work: Sequence[Work]

    def named(self, *names: str) -> list[Range]:
        """The ranges of these names."""
        return [each for each in self.ranges if each.name in names]

    def launched_in(self, ranges: Sequence[Range]) -> list[tuple[int | None, Work]]:
        """All device work, with the index of the range that it was launched in; ranges must not overlap."""
        order = sorted(range(len(ranges)), key=lambda index: ranges[index].begin)
        begins = [ranges[index].begin for index in order]

        def owner(work: Work) -> int | None:
            if work.launched is None:
                return None
            at, thread = work.launched
            place = bisect_right(begins, at) - 1
            if place < 0:
                return None
            found = ranges[order[place]]
            return order[place] if found.thread == thread and at <= found.end else None

        return [(owner(work), work) for work in self.work]

    def device_seconds(self, names: Sequence[str]) -> dict[str, list[float]]:
        """For each name, what was launched within each of its ranges, in seconds on the device."""
        ranges = self.named(*names)
        sums = [0.0] * len(ranges)
        for index, work in self.launched_in(ranges):
            if index is not None:
                sums[index] += work.end - work.begin
        seconds: dict[str, list[float]] = defaultdict(list)
        for each, total in zip(ranges, sums, strict=True):
            seconds[each.name].append(total)
        return dict(seconds)

    def device_spans(self, ranges: Sequence[Range]) -> list[Span]:
        """All device work as spans, whose owner is the index of the range that launched it."""
        return [Span(work.begin, work.end, owner) for owner, work in self.launched_in(ranges)]


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """How many of some steps ran from a graph or were repeated, and how much of what they launched or called did.

    Attributes:
        unit: what is counted: `kernels`, or `calls` of a CPU.
        counted: all of them; None where only those repeated show.
        covered: those from a graph, or native ones of a repeated step.
    """

    steps: int
    covered_steps: int
    unit: str
    counted: int | None
    covered: int


def coverage(trace: Trace, steps: Sequence[Range]) -> Coverage:
    """Of served steps: from CUDA graphs where there is work on a device, else as the replay's ranges say."""
    if trace.work:
        owned = [(owner, work) for owner, work in trace.launched_in(steps) if owner is not None]
        from_graph = [owner for owner, work in owned if work.is_from_graph]
        return Coverage(
            steps=len(steps),
            covered_steps=len(set(from_graph)),
            unit="kernels",
            counted=len(owned),
            covered=len(from_graph),
        )
    found = [(each, _NUM_CALLS.fullmatch(each.name)) for each in trace.ranges]
    repeats = [(each, match) for each, match in found if match is not None]
    inside = [
        (native, other)
        for each, match in repeats
        for native, other in [map(int, match.groups())]
        if any(step.begin <= each.begin and each.end <= step.end for step in steps)
    ]
    covered = sum(native for native, _ in inside)
    whole = len(inside) == len(steps)
    return Coverage(
        steps=len(steps),
        covered_steps=len(inside),
        unit="calls",
        counted=covered + sum(other for _, other in inside) if whole else None,
        covered=covered,
    )


def read_trace(path: Path) -> Trace:
    """The trace in a file that `export_chrome_trace` wrote."""
    return parse_trace(json.loads(path.read_text(encoding="utf-8"))["traceEvents"])


def parse_trace(events: Sequence[Mapping[str, Any]]) -> Trace:
    """The trace of Chrome's events; their times are in microseconds."""
    complete = [event for event in events if event.get("ph") == "X"]
    launches = {
        event["args"]["correlation"]: event
        for event in complete
        if event.get("cat") in _LAUNCHES and "correlation" in event.get("args", {})
    }
    callers = {
        event["args"]["External id"]: event
        for event in complete
        if event.get("cat") in _CALLERS and "External id" in event.get("args", {})
    }
    ranges, work = [], []
    for event in complete:
        begin = event["ts"] / 1e6
        end = begin + event["dur"] / 1e6
        if event.get("cat") == "user_annotation":
            ranges.append(Range(event["name"], event["tid"], begin, end))
        elif event.get("cat") in _ON_DEVICE:
            known = event.get("args", {})
            launch = launches.get(known.get("correlation")) or callers.get(known.get("External id"))
            launched = None if launch is None else (launch["ts"] / 1e6, launch["tid"])
            from_graph = launch is not None and "GraphLaunch" in launch["name"]
            work.append(Work(event["name"], begin, end, launched, from_graph))
    return Trace(sorted(ranges, key=lambda each: each.begin), sorted(work, key=lambda each: each.begin))
