"""Our server beside vLLM's CPU server and llama.cpp's on one model, in turns, as JSON and a table.

    python benchmarks/servers.py smollm2 --prepare      # environments and model files, nothing measured
    python benchmarks/servers.py smollm2 --output benchmarks/results

Every server stays loaded; at each workload they take turns (A B C A B C ...), and those whose turn it is not are
stopped (SIGSTOP). One client loads them all, on the same machine. A first round is not counted. The limits of the
machine, and how busy others keep it, are measured in every round.
"""

import argparse
import dataclasses
import os
import signal
import statistics
import sys
import tempfile
from contextlib import ExitStack
from functools import partial
from pathlib import Path

from peers import environments, http_load, models, records
from peers.conditions import conditions
from peers.http_load import Outcome, Request
from peers.http_servers import KINDS, MODEL, START_SECONDS, Prepared, prepare
from peers.process import PeerError, Server
from peers.subjects import vocab_size
from peers.workloads import SMOKE, Load, Workloads

PRECISIONS = ("bf16", "int8")
WITH_DRAFTS = "AutoDeploy with drafts"
SHOWN = ("requests_per_second", "first_token_p50_seconds", "between_tokens_p50_seconds", "guided_1_overhead")


class Rounds:
    """Servers of one precision that take turns, and what was measured of them: server -> figure -> value per round."""

    def __init__(self, load: Load, num_ids: int) -> None:
        self._load, self._num_ids = load, num_ids
        self._running: dict[str, tuple[Prepared, Server]] = {}
        self.samples: dict[str, dict[str, list[float]]] = {}
        self.failed: dict[str, str] = {}

    def start(self, prepared: list[Prepared], stack: ExitStack) -> None:
        """Launch each, one after the other, and hold it still once it is ready."""
        for each in prepared:
            server = stack.enter_context(each.launch())
            try:
                server.wait_until_ready(each.kind.ready, START_SECONDS)
            except PeerError as error:
                self._fail(each.name, f"start: {error}")
                continue
            server.hold()
            self._running[each.name] = (each, server)

    def once(self, turn: int) -> None:
        """Every server's turn at every workload; round 0 is not counted."""
        workloads = Workloads(self._load, self._num_ids, turn)
        for workload in workloads.names():
            for name, (each, server) in list(self._running.items()):
                if name == WITH_DRAFTS and workload != "repetitive":
                    continue
                server.release()
                try:
                    figures = workloads.run(workload, partial(_send, each, server), each.kind.guided)
                except PeerError as error:
                    self._fail(name, f"{workload}: {error}")
                    self._running.pop(name)
                    figures = {}
                server.hold()
                print(f"{name}: {workload}: " + ", ".join(f"{key} {value:.4g}" for key, value in figures.items()))
                for key, value in figures.items() if turn else ():
                    self.samples.setdefault(name, {}).setdefault(key, []).append(value)

    def _fail(self, name: str, reason: str) -> None:
        print(f"{name} failed: {reason}", flush=True)
        self.failed[name] = reason

    def end(self) -> None:
        """Note the peak of memory of each."""
        for name, (_, server) in self._running.items():
            self.samples[name]["peak_bytes"] = [server.peak_bytes()]


def _send(prepared: Prepared, server: Server, requests: list[Request], concurrency: int) -> Outcome:
    own = [dataclasses.replace(it, fields=prepared.kind.fields | it.fields) for it in requests]
    return http_load.run(server.url, MODEL, own, concurrency)


def run(given: argparse.Namespace, build: Path) -> None:
    """Compare on one model and write the record."""
    checkpoint = models.folder(build, given.model)
    ready, missing = [], {}
    for precision in given.precision:
        for name in given.server:
            try:
                ready.append(prepare(name, precision, given.model, checkpoint, build))
            except environments.NotAvailable as reason:
                missing[f"{name} {precision}"] = str(reason)
                print(f"not available: {name} {precision}: {reason}", flush=True)
    if given.prepare:
        return
    load = SMOKE if given.smoke else Load()
    limits, groups = [], {}
    for precision in given.precision:
        rounds = Rounds(load, min(vocab_size(checkpoint), 8192))
        with ExitStack() as stack:
            rounds.start([each for each in ready if each.precision == precision], stack)
            for turn in range(given.rounds + 1):
                limits.append(conditions(0.1 if given.smoke else 3.0))
                print(f"-- {precision}, round {turn} of {given.rounds}", flush=True)
                rounds.once(turn)
            rounds.end()
        groups[precision] = {"samples": rounds.samples, "failed": rounds.failed}
    for precision, group in groups.items():
        for name, figures in group["samples"].items():
            shown = [f"{key} {statistics.median(values):.4g}" for key, values in figures.items() if key.endswith(SHOWN)]
            print(f"{precision} {name}: {', '.join(shown)}")
    used = {each.kind.environment for each in ready} - {None}
    records.write(given.output, "servers", given.model, load, limits, groups, missing, sorted(map(str, used)), build)


def main(arguments: list[str] | None = None) -> None:
    """Compare on the model that is named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="smollm2", help=f"of {', '.join(models.NAMES)}, or a folder")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--server", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--prepare", action="store_true", help="make what is missing and measure nothing")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, no environments, seconds")
    parser.add_argument("--build", type=Path, default=Path(__file__).parents[1] / "build" / "peers")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/local"))
    given = parser.parse_args(arguments)
    if "OMP_NUM_THREADS" in os.environ and not (given.smoke or given.prepare):
        parser.error("OMP_NUM_THREADS is set, which servers take for what they are to use: run with `env -u`")
    if given.smoke:
        given.model, given.rounds, given.precision, given.server = "tiny", 1, ["bf16"], ["AutoDeploy"]
    with tempfile.TemporaryDirectory() as scratch:
        run(given, Path(scratch) if given.smoke else given.build.resolve())


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that no server is left behind, standing still
    main()
