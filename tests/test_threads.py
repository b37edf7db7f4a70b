"""OpenMP's idle threads end when asked to, and when an engine has nothing to do; the next loop has them again."""

import asyncio
import os
import sys

import pytest
import torch

from autodeploy.runtime.request import SamplingParams, TokenOutput
from autodeploy.threads import release_threads
from tests.runtime.fake_engine import FakeEngine
from tests.runtime.test_async_engine import running, tokens_of, wait_until
from tests.threads import torch_threads

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts a process's threads in /proc")

NUM_THREADS = 3


def num_threads() -> int:
    return len(os.listdir("/proc/self/task"))


def run_a_parallel_loop() -> None:
    torch.zeros(2**20).exp_()


def num_threads_alone() -> int:
    """Without a team of this thread; other threads that torch starts once exist already."""
    run_a_parallel_loop()
    release_threads()
    return num_threads()


def test_a_released_team_is_gone_and_comes_back() -> None:
    with torch_threads(NUM_THREADS):
        alone = num_threads_alone()
        run_a_parallel_loop()
        assert num_threads() == alone + NUM_THREADS - 1
        release_threads()
        wait_until(lambda: num_threads() == alone)
        run_a_parallel_loop()
        assert num_threads() == alone + NUM_THREADS - 1
        release_threads()


class ParallelEngine(FakeEngine):
    """Its steps run a parallel loop."""

    most_threads = 0

    def step(self) -> list[TokenOutput]:
        run_a_parallel_loop()
        self.most_threads = max(self.most_threads, num_threads())
        return super().step()


def test_an_idle_engine_keeps_no_team() -> None:
    with torch_threads(NUM_THREADS):
        alone = num_threads_alone()
        fake = ParallelEngine()
        with running(fake) as engine:
            for request_id in ("first", "second"):
                fake.most_threads = 0
                assert asyncio.run(tokens_of(engine, request_id, [7], SamplingParams(max_tokens=3))) == [7] * 3
                assert fake.most_threads >= alone + NUM_THREADS  # the engine's thread and the others of its team
                wait_until(lambda: num_threads() == alone + 1)
