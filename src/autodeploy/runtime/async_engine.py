"""Runs a token engine in a thread of its own: requests go in as messages, token outputs come back as messages.

Nothing but plain data crosses between the threads. The engine's thread alone touches the engine.
"""

import asyncio
import logging
import queue
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, Unpack

from autodeploy.compile.program import Program
from autodeploy.errors import AutoDeployError, EngineDeadError, InvalidRequestError
from autodeploy.runtime.request import RequestOptions, SamplingParams, TokenOutput
from autodeploy.runtime.stats import EngineStats
from autodeploy.threads import release_threads

logger = logging.getLogger(__name__)

STEP_TIMEOUT_SECONDS = 600.0
"""A step that takes longer counts as hung. Generous: the first step of a shape may compile."""
IDLE_SECONDS = 0.05
"""Without a request for so long, an engine leaves the processors to other engines of the process."""

Delivery = list[TokenOutput] | AutoDeployError
"""What a request's owner receives: [] once when it was accepted, then token outputs, or the error that ended it."""


class TokenEngine(Protocol):
    """What `runtime.engine.Engine` and `runtime.demo.DemoEngine` have in common."""

    program: Program

    def add_request(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        **options: Unpack[RequestOptions],
    ) -> None: ...
    def abort_request(self, request_id: str, index: int | None = None) -> list[TokenOutput]: ...
    def step(self) -> list[TokenOutput]: ...
    def has_unfinished_requests(self) -> bool: ...
    def stats(self) -> EngineStats: ...


@dataclass(frozen=True, kw_only=True)
class _Submit:
    request_id: str
    prompt_token_ids: Sequence[int]
    params: SamplingParams
    options: RequestOptions
    deliver: Callable[[Delivery], None]


@dataclass(frozen=True)
class _Abort:
    request_id: str
    index: int | None


@dataclass(frozen=True)
class _Stop:
    pass


@dataclass
class _Route:
    """Where a request's outputs go, and which of its sequences are still running."""

    deliver: Callable[[Delivery], None]
    live: set[int]


class AsyncEngine:
    """A token engine beside the event loop (or beside any other thread).

    Args:
        engine: from now on used by this object's thread only.
        step_timeout_seconds: a step that runs longer makes `is_healthy` false until it ends.
    """

    def __init__(self, engine: TokenEngine, *, step_timeout_seconds: float = STEP_TIMEOUT_SECONDS):
        self._engine = engine
        self._inbox: queue.SimpleQueue[_Submit | _Abort | _Stop] = queue.SimpleQueue()
        self._routes: dict[str, _Route] = {}
        self._mailboxes: dict[asyncio.AbstractEventLoop, Mailbox] = {}
        self._stats = engine.stats()
        self._step_timeout_seconds = step_timeout_seconds
        self._step_started: float | None = None
        self._ended = False
        self._cause: BaseException | None = None
        self._lock = threading.Lock()  # holds `_ended` still while a message is put into the inbox
        self._thread = threading.Thread(target=self._run, name="autodeploy-engine", daemon=True)
        self._thread.start()

    @property
    def is_healthy(self) -> bool:
        """False once the engine has stopped, and while a step has been running for too long."""
        started = self._step_started
        hung = started is not None and time.monotonic() - started > self._step_timeout_seconds
        return not self._ended and self._thread.is_alive() and not hung

    @property
    def has_failed(self) -> bool:
        """True once the engine has stopped without being asked to."""
        return self._ended and self._cause is not None

    @property
    def program(self) -> Program:
        """The program that the engine ran last, or will run first."""
        return self._engine.program

    def stats(self) -> EngineStats:
        """The engine's counters as of its latest step."""
        return self._stats

    def submit(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        deliver: Callable[[Delivery], None],
        **options: Unpack[RequestOptions],
    ) -> None:
        """Hand a request to the engine and return at once.

        Args:
            deliver: called in the engine's thread; must not block. See `Delivery`.
        Raises:
            EngineDeadError: the engine has stopped.
        """
        message = _Submit(
            request_id=request_id,
            prompt_token_ids=prompt_token_ids,
            params=params,
            options=options,
            deliver=deliver,
        )
        with self._lock:
            if self._ended:
                raise self._dead_error()
            self._inbox.put(message)

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Stop a request, or one of its sequences; no more outputs come. Does nothing when it has ended already."""
        self._inbox.put(_Abort(request_id, index))

    def mailbox(self, loop: asyncio.AbstractEventLoop) -> "Mailbox":
        """The mailbox of an event loop that runs; those of closed ones are forgotten."""
        self._mailboxes = {each: mailbox for each, mailbox in self._mailboxes.items() if not each.is_closed()}
        return self._mailboxes.setdefault(loop, Mailbox(loop))

    def open(self) -> "TokenStream":
        """A stream for one or more requests of the running event loop."""
        return TokenStream(self)

    async def generate(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        **options: Unpack[RequestOptions],
    ) -> AsyncIterator[TokenOutput]:
        """Token outputs of one request as they come. Leaving the loop, or being cancelled, aborts the request.

        Raises:
            InvalidRequestError, EngineOverloadedError: the engine refused the request.
            EngineDeadError: the engine stopped.
        """
        with self.open() as stream:
            await stream.add(request_id, prompt_token_ids, params, **options)
            async for output in stream:
                yield output

    def shutdown(self, timeout_seconds: float = 30.0) -> None:
        """Stop after the current step; whoever still waits gets EngineDeadError. May be called again."""
        self._inbox.put(_Stop())
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout_seconds)

    def _run(self) -> None:
        try:
            while self._handle_messages():
                if self._engine.has_unfinished_requests():
                    self._step_started = time.monotonic()
                    outputs = self._engine.step()
                    self._step_started = None
                    self._stats = self._engine.stats()  # who has got a token finds it counted
                    self._route(outputs)
                self._stats = self._engine.stats()
        except BaseException as error:  # whatever it was, those who wait must hear of it
            logger.critical("the engine stopped: %s: %s", type(error).__name__, error, exc_info=error)
            self._end(error)
        else:
            self._end(None)

    def _handle_messages(self) -> bool:
        """Take all messages from the inbox; wait for one when there is nothing else to do. False: time to stop."""
        if self._engine.has_unfinished_requests():
            message = self._next_message(block=False)
        else:
            message = self._next_message(timeout=IDLE_SECONDS)
            if message is None:
                release_threads()
                message = self._next_message()
        while message is not None:
            if isinstance(message, _Stop):
                return False
            if isinstance(message, _Submit):
                self._accept(message)
            else:
                self._drop(message.request_id, message.index)
            message = self._next_message(block=False)
        return True

    def _next_message(self, block: bool = True, timeout: float | None = None) -> _Submit | _Abort | _Stop | None:
        try:
            return self._inbox.get(block, timeout)
        except queue.Empty:
            return None

    def _accept(self, message: _Submit) -> None:
        try:
            if message.request_id in self._routes:
                raise InvalidRequestError(f"a request with id {message.request_id!r} is already running", "request_id")
            self._engine.add_request(message.request_id, message.prompt_token_ids, message.params, **message.options)
        except AutoDeployError as error:
            message.deliver(error)
        except Exception as error:  # one odd request must not take the others with it
            logger.exception("a request could not be added")
            refusal = InvalidRequestError(f"the request could not be added: {type(error).__name__}: {error}")
            refusal.__cause__ = error
            message.deliver(refusal)
        else:
            self._routes[message.request_id] = _Route(message.deliver, set(range(message.params.n)))
            self._deliver(message.request_id, [])

    def _route(self, outputs: list[TokenOutput]) -> None:
        by_request: dict[str, list[TokenOutput]] = {}
        for output in outputs:
            by_request.setdefault(output.request_id, []).append(output)
        for request_id, own in by_request.items():
            route = self._routes.get(request_id)
            if route is None:
                continue
            own = [output for output in own if output.index in route.live]
            for output in own:
                if output.finish_reason is not None:
                    route.live.discard(output.index)
            self._deliver(request_id, own)
            if not route.live:
                self._routes.pop(request_id, None)

    def _deliver(self, request_id: str, outputs: list[TokenOutput]) -> None:
        try:
            self._routes[request_id].deliver(outputs)
        except RuntimeError:  # the event loop that waited is closed
            self._drop(request_id, None)

    def _drop(self, request_id: str, index: int | None) -> None:
        route = self._routes.get(request_id)
        if route is None or (index is not None and index not in route.live):
            return
        route.live -= route.live.copy() if index is None else {index}
        if not route.live:
            del self._routes[request_id]
        self._engine.abort_request(request_id, index)

    def _end(self, cause: BaseException | None) -> None:
        with self._lock:
            self._ended, self._cause = True, cause
        waiting = [route.deliver for route in self._routes.values()]
        self._routes.clear()
        while not self._inbox.empty():
            message = self._inbox.get()
            if isinstance(message, _Submit):
                waiting.append(message.deliver)
        for deliver in waiting:
            try:
                deliver(self._dead_error())
            except RuntimeError:
                continue  # the event loop that waited is closed

    def _dead_error(self) -> EngineDeadError:
        if self._cause is None:
            return EngineDeadError("the engine was shut down; create a new one to go on")
        if isinstance(self._cause, EngineDeadError):  # the engine has said it already
            error, cause = EngineDeadError(str(self._cause)), self._cause.__cause__
        else:
            error, cause = (
                EngineDeadError(f"the engine stopped: {type(self._cause).__name__}: {self._cause}"),
                self._cause,
            )
        error.__cause__ = cause
        return error


class Mailbox:
    """Carries deliveries from the engine's thread to an event loop, which is woken once for all that have come."""

    def __init__(self, loop: asyncio.AbstractEventLoop):
        self._loop = loop
        self._waiting: deque[Callable[[], None]] = deque()
        self._is_woken = False

    def put(self, receive: Callable[[], None]) -> None:
        """Have this called in the loop. Raises RuntimeError when the loop is closed."""
        self._waiting.append(receive)
        if not self._is_woken or self._loop.is_closed():
            self._is_woken = True
            self._loop.call_soon_threadsafe(self._empty)

    def _empty(self) -> None:
        self._is_woken = False  # before the first look: what comes from now on wakes the loop again
        while self._waiting:
            self._waiting.popleft()()


class TokenStream:
    """Requests of one consumer in an event loop, and their token outputs in the order they come.

    A context manager: leaving it aborts what is unfinished. Use it from the event loop it was made in.
    """

    def __init__(self, engine: AsyncEngine):
        self._engine = engine
        self._loop = asyncio.get_running_loop()
        self._mailbox = engine.mailbox(self._loop)
        self._received: asyncio.Queue[TokenOutput | AutoDeployError] = asyncio.Queue()
        self._accepted: dict[str, asyncio.Future[None]] = {}
        self._live: dict[str, set[int]] = {}

    def __enter__(self) -> "TokenStream":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    async def add(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        **options: Unpack[RequestOptions],
    ) -> None:
        """Add a request; return when the engine has accepted it.

        Raises:
            InvalidRequestError, EngineOverloadedError: the engine refused it.
            EngineDeadError: the engine has stopped.
        """

        def deliver(delivery: Delivery) -> None:
            self._mailbox.put(partial(self._receive, request_id, delivery))

        accepted: asyncio.Future[None] = self._loop.create_future()
        self._accepted[request_id] = accepted
        self._engine.submit(request_id, prompt_token_ids, params, deliver, **options)
        try:
            await accepted
        except AutoDeployError:
            raise  # refused: there is nothing to abort
        except BaseException:
            self._engine.abort(request_id)
            raise
        finally:
            self._accepted.pop(request_id, None)
        self._live[request_id] = set(range(params.n))

    def abort(self, request_id: str, index: int | None = None) -> None:
        """Stop a request, or one of its sequences; nothing more of it comes out of the stream."""
        live = self._live.get(request_id, set())
        live -= live.copy() if index is None else {index}
        self._engine.abort(request_id, index)

    def close(self) -> None:
        """Abort whatever is unfinished."""
        for request_id, live in self._live.items():
            if live:
                self.abort(request_id)

    def __aiter__(self) -> "TokenStream":
        return self

    async def __anext__(self) -> TokenOutput:
        """The next output of a sequence that was not aborted.

        Raises:
            EngineDeadError: the engine stopped.
        """
        while any(self._live.values()):
            received = await self._received.get()
            if isinstance(received, AutoDeployError):
                self._live.clear()
                raise received
            live = self._live.get(received.request_id, set())
            if received.index in live:
                if received.finish_reason is not None:
                    live.discard(received.index)
                return received
        raise StopAsyncIteration

    def _receive(self, request_id: str, delivery: Delivery) -> None:
        accepted = self._accepted.get(request_id)
        if accepted is not None and not accepted.done():
            if isinstance(delivery, AutoDeployError):
                accepted.set_exception(delivery)
            else:
                accepted.set_result(None)
            return
        for item in [delivery] if isinstance(delivery, AutoDeployError) else delivery:
            self._received.put_nowait(item)
