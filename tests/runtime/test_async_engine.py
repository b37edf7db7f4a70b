"""The engine's thread: outputs reach their owners, aborts reach the engine, a crash reaches everybody."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import pytest
from torch import Tensor

from autodeploy.config import EngineOptions
from autodeploy.errors import AutoDeployError, EngineDeadError, EngineOverloadedError, InvalidRequestError
from autodeploy.runtime.async_engine import AsyncEngine, Delivery, Mailbox
from autodeploy.runtime.engine import Engine
from autodeploy.runtime.request import SamplingParams
from tests.runtime.fake_engine import FakeEngine
from tests.runtime.toy import toy_program


@contextmanager
def running(fake: FakeEngine, **options: float) -> Iterator[AsyncEngine]:
    engine = AsyncEngine(fake, **options)
    try:
        yield engine
    finally:
        fake.hold.clear()
        engine.shutdown()


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited too long"
        time.sleep(0.005)


async def tokens_of(engine: AsyncEngine, request_id: str, prompt: list[int], params: SamplingParams) -> list[int]:
    return [token async for output in engine.generate(request_id, prompt, params) for token in output.token_ids]


def test_many_requests_get_their_own_tokens() -> None:
    async def everything() -> list[list[int]]:
        params = SamplingParams(max_tokens=5)
        return await asyncio.gather(*(tokens_of(engine, f"r{i}", [i + 1], params) for i in range(20)))

    with running(FakeEngine()) as engine:
        assert asyncio.run(everything()) == [[i + 1] * 5 for i in range(20)]
        wait_until(lambda: engine.stats().generation_tokens == 100)


def test_who_has_got_a_token_finds_it_counted() -> None:
    counted: list[int] = []

    def deliver(delivery: Delivery) -> None:
        assert isinstance(delivery, list)
        if delivery:
            counted.append(engine.stats().generation_tokens)

    with running(FakeEngine()) as engine:
        engine.submit("r", [1], SamplingParams(max_tokens=3), deliver)
        wait_until(lambda: len(counted) == 3)
    assert counted == [1, 2, 3]


def test_cancelling_the_consumer_aborts_the_request() -> None:
    fake = FakeEngine(step_seconds=0.001)

    async def cancel_in_the_middle() -> None:
        task = asyncio.create_task(tokens_of(engine, "endless", [1], SamplingParams(max_tokens=None)))
        await asyncio.sleep(0.1)
        assert not task.done()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with running(fake) as engine:
        asyncio.run(cancel_in_the_middle())
        wait_until(lambda: ("endless", None) in fake.aborted and not fake.has_unfinished_requests())


def test_an_abort_within_a_step_frees_everything_before_the_next_one() -> None:
    program = toy_program(("full", "slot"))
    graph = program.graphs["text"]
    is_inside, goes_on = threading.Semaphore(0), threading.Semaphore(0)

    def run(*inputs: Tensor) -> Tensor:
        is_inside.release()
        assert goes_on.acquire(timeout=10)
        return graph.function(*inputs)

    program = replace(program, graphs={"text": replace(graph, function=run)})
    engine = AsyncEngine(Engine(program, EngineOptions(page_size=4), 64))
    try:
        engine.submit("a", list(range(20)), SamplingParams(max_tokens=40), lambda delivery: None)
        for _ in range(2):
            goes_on.release()
        for _ in range(3):
            assert is_inside.acquire(timeout=10)
        engine.abort("a")
        goes_on.release()
        wait_until(lambda: engine.stats().num_steps == 3 and engine.stats().num_running == 0)
        assert engine.stats().state_usage_fraction == 0
    finally:
        engine.shutdown()


def test_cancelling_before_acceptance_aborts_too() -> None:
    fake = FakeEngine()

    async def cancel_while_queued() -> None:
        first = asyncio.create_task(tokens_of(engine, "first", [1], SamplingParams(max_tokens=3)))
        await asyncio.sleep(0.05)  # its first step is held
        second = asyncio.create_task(tokens_of(engine, "second", [2], SamplingParams(max_tokens=None)))
        await asyncio.sleep(0.05)
        second.cancel()
        await asyncio.gather(second, return_exceptions=True)
        fake.hold.clear()
        assert await first == [1, 1, 1]

    with running(fake) as engine:
        fake.hold.set()
        asyncio.run(cancel_while_queued())
        wait_until(lambda: ("second", None) in fake.aborted)


def test_leaving_the_loop_aborts_the_request() -> None:
    fake = FakeEngine()

    async def take_three() -> None:
        with engine.open() as stream:
            await stream.add("r", [1], SamplingParams(max_tokens=None))
            for _ in range(3):
                await anext(stream)

    with running(fake) as engine:
        asyncio.run(take_three())
        wait_until(lambda: ("r", None) in fake.aborted)


def test_aborting_one_sequence_leaves_the_others() -> None:
    fake = FakeEngine(step_seconds=0.001)

    async def abort_one() -> list[int]:
        ended = []
        with engine.open() as stream:
            await stream.add("r", [1], SamplingParams(n=3, max_tokens=20))
            stream.abort("r", 1)
            async for output in stream:
                assert output.index != 1
                if output.finish_reason:
                    ended.append(output.index)
        return ended

    with running(fake) as engine:
        assert sorted(asyncio.run(abort_one())) == [0, 2]
        assert ("r", 1) in fake.aborted


def test_a_crash_reaches_everybody_at_once() -> None:
    fake = FakeEngine(crash_at_step=5)

    async def everybody() -> list[list[int] | BaseException]:
        params = SamplingParams(max_tokens=None)
        tasks = [tokens_of(engine, f"r{i}", [i + 1], params) for i in range(4)]
        return await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), timeout=20)

    with running(fake) as engine:
        assert engine.is_healthy
        for error in asyncio.run(everybody()):
            assert isinstance(error, EngineDeadError)
            assert "the cable was pulled" in str(error)
            assert isinstance(error.__cause__, RuntimeError)
        assert not engine.is_healthy
        with pytest.raises(EngineDeadError):  # and whoever comes later hears it at once
            engine.submit("late", [1], SamplingParams(), lambda delivery: None)


def test_refusals_reach_the_one_who_asked() -> None:
    async def ask() -> None:
        with pytest.raises(InvalidRequestError, match="empty"):
            await tokens_of(engine, "bad", [], SamplingParams())
        with pytest.raises(InvalidRequestError, match="could not be added"):
            await tokens_of(engine, "odd", ["x"], SamplingParams())  # type: ignore[list-item]
        with engine.open() as stream:
            await stream.add("same", [1], SamplingParams(max_tokens=None))
            with pytest.raises(InvalidRequestError, match="already running"):
                await tokens_of(engine, "same", [1], SamplingParams())
            await anext(stream)  # the first one was not harmed
            with pytest.raises(EngineOverloadedError):
                await tokens_of(engine, "more", [1], SamplingParams())

    with running(FakeEngine(max_queued=1)) as engine:
        asyncio.run(ask())
        assert engine.is_healthy


def test_a_hanging_step_is_not_healthy() -> None:
    fake = FakeEngine()
    with running(fake, step_timeout_seconds=0.05) as engine:
        time.sleep(0.1)
        assert engine.is_healthy  # nothing to do is no hang
        fake.hold.set()
        engine.submit("r", [1], SamplingParams(max_tokens=None), lambda delivery: None)
        wait_until(lambda: not engine.is_healthy)
        fake.hold.clear()
        wait_until(lambda: engine.is_healthy)


def test_shutdown_tells_those_who_wait_and_ends_the_thread() -> None:
    received: list[Delivery] = []
    fake = FakeEngine(step_seconds=0.001)
    engine = AsyncEngine(fake)
    engine.submit("r", [1], SamplingParams(max_tokens=None), received.append)
    wait_until(lambda: len(received) > 3)
    engine.shutdown()
    engine.shutdown()
    assert received[0] == []  # accepted
    assert isinstance(received[-1], EngineDeadError) and "shut down" in str(received[-1])
    assert not engine.is_healthy
    assert "autodeploy-engine" not in {thread.name for thread in threading.enumerate()}


def test_a_closed_event_loop_does_not_hurt_the_others() -> None:
    fake = FakeEngine(step_seconds=0.001)
    received: list[Delivery] = []

    async def start_and_vanish() -> None:
        stream = engine.open()
        await stream.add("gone", [1], SamplingParams(max_tokens=None))

    with running(fake) as engine:
        engine.submit("stays", [2], SamplingParams(max_tokens=None), received.append)
        asyncio.run(start_and_vanish())
        wait_until(lambda: ("gone", None) in fake.aborted)
        before = len(received)
        wait_until(lambda: len(received) > before + 3)
        assert not any(isinstance(delivery, AutoDeployError) for delivery in received)


def test_an_event_loop_is_woken_once_for_all_that_has_come(monkeypatch: pytest.MonkeyPatch) -> None:
    woken: list[int] = []
    received: list[int] = []

    async def use() -> Mailbox:
        loop = asyncio.get_running_loop()
        wake = loop.call_soon_threadsafe
        monkeypatch.setattr(loop, "call_soon_threadsafe", lambda call: (woken.append(1), wake(call)))
        mailbox = Mailbox(loop)
        for number in range(3):
            mailbox.put(partial(received.append, number))
        assert (received, len(woken)) == ([], 1)
        await asyncio.sleep(0.01)
        mailbox.put(partial(received.append, 3))
        await asyncio.sleep(0.01)
        assert (received, len(woken)) == ([0, 1, 2, 3], 2)
        mailbox.put(partial(received.append, 4))
        return mailbox

    mailbox = asyncio.run(use())
    monkeypatch.undo()
    with pytest.raises(RuntimeError, match="closed"):
        mailbox.put(partial(received.append, 5))
    assert received == [0, 1, 2, 3, 4]
