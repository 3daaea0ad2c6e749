"""The thread that owns the engine. Coroutines submit and cancel requests through a queue and receive tokens."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from lmchat.generation.engine import Engine, TokenEvent
from lmchat.generation.sampling import SamplingParams
from lmchat.types import UserError

logger = logging.getLogger(__name__)
T = TypeVar("T")
Numbered = tuple[int, TokenEvent]
"""The number of a completion, and a token of it."""


class EngineFailure(RuntimeError):
    """The engine has failed; the server's log has the reason."""


class Generation:
    """Completions being generated; iterating yields tokens until all have ended.

    Completion i is sample ``i % num_samples`` of prompt ``i // num_samples``.

    Attributes:
        remaining: numbers of the completions that have not ended.
    """

    def __init__(self, worker: EngineWorker, requests: Sequence[int], num_samples: int) -> None:
        self.remaining = set(range(len(requests) * num_samples))
        self._worker = worker
        self._requests = requests
        self._num_samples = num_samples
        self._events: asyncio.Queue[list[Numbered] | Exception] = asyncio.Queue()

    def deliver(self, events: list[Numbered] | Exception) -> None:
        """Called in the event loop with the tokens of a step, or the error that ends the generation."""
        self._events.put_nowait(events)

    async def __aiter__(self) -> AsyncIterator[list[Numbered]]:
        while self.remaining:
            batch: list[Numbered] = []
            waiting = [await self._events.get()]
            while not self._events.empty():  # a slow reader gets all missed tokens at once
                waiting.append(self._events.get_nowait())
            for events in waiting:
                if isinstance(events, Exception):
                    raise events
                batch += [(number, event) for number, event in events if number in self.remaining]
            self.remaining -= {number for number, event in batch if event.finish_reason}
            yield batch

    def cancel(self, number: int) -> None:
        """Cancels a completion before the next step."""
        if number in self.remaining:
            self.remaining.remove(number)
            prompt, sample = divmod(number, self._num_samples)
            self._worker.cancel(self._requests[prompt], sample)

    def close(self) -> None:
        if self.remaining:
            self.remaining = set()
            for request in self._requests:
                self._worker.cancel(request)


class EngineWorker:
    """Steps the engine in a separate thread as long as there are requests.

    Args:
        engine: the engine; must not be used otherwise until `close`.

    Attributes:
        failed: whether the engine has failed, other than because of a request, and has stopped.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.failed = False
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._owners: dict[int, tuple[Generation, int]] = {}  # by request, with the number of its first sample
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Starts the thread; called in the event loop that will use it."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def close(self) -> None:
        """Stops the thread after the current step; open generations receive an error."""
        self._commands.put(self._close)
        self._thread.join()

    async def generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> Generation:
        """Queues prompts in the engine.

        Raises:
            UserError: the engine refuses one.
            EngineFailure: the engine has failed before.
        """

        def add() -> Generation:
            requests: list[int] = []
            for prompt in prompts:
                try:
                    requests.append(self.engine.add_request(prompt, params))
                except UserError:
                    for request in requests:
                        self.engine.cancel(request)
                    raise
            generation = Generation(self, requests, params.num_samples)
            starts = range(0, len(requests) * params.num_samples, params.num_samples)
            self._owners.update(zip(requests, ((generation, start) for start in starts), strict=True))
            return generation

        def abandon(future: Future[Generation]) -> None:
            if not future.cancelled() and future.exception() is None:
                future.result().close()

        future = self._submit(add)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            future.add_done_callback(abandon)
            raise

    async def call(self, function: Callable[[], T]) -> T:
        """Calls ``function`` in the engine's thread between two steps and returns its result.

        Raises:
            EngineFailure: the engine has failed before.
        """
        return await asyncio.wrap_future(self._submit(function))

    def _submit(self, function: Callable[[], T]) -> Future[T]:
        """Queues a call of ``function`` in the engine's thread."""
        future: Future[T] = Future()

        def run() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)

        if self.failed or self._closed:
            raise EngineFailure("the engine has stopped; restart the server")
        self._commands.put(run)
        return future

    def cancel(self, request: int, sample: int | None = None) -> None:
        """Cancels a sample of a request, or all of them, before the next step."""

        def run() -> None:
            self.engine.cancel(request, sample)
            self._forget_ended([request])

        self._commands.put(run)

    # -----------------------------------------------------------------------------------------------------------------
    # In the thread

    def _run(self) -> None:
        while not self._closed:
            self._take_commands()
            if self._closed or not self._owners:
                continue
            try:
                events = self.engine.step()
            except UserError as error:  # non-finite logits: the engine has cancelled everything and can continue
                logger.error("%s", error)
                self._fail_all(EngineFailure(str(error)))
            except Exception:
                logger.exception("the engine has failed")
                self.failed = True
                self._fail_all(EngineFailure("the engine has failed; restart the server"))
            else:
                self._deliver(events)

    def _take_commands(self) -> None:
        """Runs all queued commands; waits for one if there are no requests."""
        if not self._owners:
            self._commands.get()()
        while not self._closed:
            try:
                self._commands.get_nowait()()
            except queue.Empty:
                return

    def _deliver(self, events: list[TokenEvent]) -> None:
        batches: dict[Generation, list[Numbered]] = {}
        for event in events:
            generation, start = self._owners[event.request]
            batches.setdefault(generation, []).append((start + event.sample, event))
        self._forget_ended({event.request for event in events})
        self._in_loop(_deliver_all, batches)

    def _forget_ended(self, requests: Iterable[int]) -> None:
        for request in requests:
            if not self.engine.is_open(request):
                self._owners.pop(request, None)

    def _fail_all(self, error: EngineFailure) -> None:
        batches = {generation: error for generation, _ in self._owners.values()}
        self._owners.clear()
        self._in_loop(_deliver_all, batches)

    def _close(self) -> None:
        self._closed = True
        for request in self._owners:
            self.engine.cancel(request)
        self._fail_all(EngineFailure("the server has shut down"))

    def _in_loop(self, function: Callable[..., None], *arguments: Any) -> None:
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(function, *arguments)


def _deliver_all(batches: Mapping[Generation, list[Numbered] | Exception]) -> None:
    for generation, events in batches.items():
        generation.deliver(events)
