"""The thread that owns the engine. Coroutines submit and cancel requests between steps, and receive tokens."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

from lmchat.generation.engine import Engine, TokenEvent
from lmchat.generation.sampling import SamplingParams
from lmchat.hardware import is_out_of_memory
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
        requests: the engine's requests, one per prompt, once they are queued.
        events: tokens of steps, or the error that ends the generation.
    """

    def __init__(self, worker: EngineWorker, num_prompts: int, num_samples: int) -> None:
        self.remaining = set(range(num_prompts * num_samples))
        self.requests: list[int] = []
        self._worker = worker
        self._num_samples = num_samples
        self.events: asyncio.Queue[list[Numbered] | Exception] = asyncio.Queue()

    async def __aiter__(self) -> AsyncIterator[list[Numbered]]:
        while self.remaining:
            batch: list[Numbered] = []
            waiting = [await self.events.get()]
            while not self.events.empty():  # a slow reader gets all missed tokens at once
                waiting.append(self.events.get_nowait())
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
            self._worker.cancel(self.requests[prompt : prompt + 1], sample)

    def close(self) -> None:
        if self.remaining:
            self.remaining = set()
            self._worker.cancel(self.requests)


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
        self._owners: dict[int, tuple[Generation, int]] = {}  # by request, with the number of its first sample
        self._closed = False
        self._step_is_scheduled = False
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="engine")

    def start(self) -> None:
        """Must be called in the event loop that will use the worker, before it does."""
        self._loop = asyncio.get_running_loop()

    def close(self) -> None:
        """Stops after the current step; open generations receive an error."""
        self._closed = True
        self._thread.submit(self._close)
        self._thread.shutdown()

    async def generate(self, prompts: Sequence[Sequence[int]], params: SamplingParams) -> Generation:
        """Queues prompts in the engine.

        Raises:
            UserError: the engine refuses one.
            EngineFailure: the engine has failed before.
        """
        generation = Generation(self, len(prompts), params.num_samples)
        requests = generation.requests

        def add() -> None:
            try:
                for prompt in prompts:
                    requests.append(self.engine.add_request(prompt, params))
            except Exception:
                for request in requests:
                    self.engine.cancel(request)
                raise
            for number, request in enumerate(requests):
                self._owners[request] = generation, number * params.num_samples
            self._schedule_step()

        try:
            await self.call(add)
        except asyncio.CancelledError:
            generation.close()  # behind `add`, if that runs at all
            raise
        return generation

    async def call(self, function: Callable[[], T]) -> T:
        """Calls ``function`` in the engine's thread between two steps and returns its result.

        Raises:
            EngineFailure: the engine has failed before.
        """
        return await asyncio.wrap_future(self._submit(function))

    def _submit(self, function: Callable[[], T]) -> Future[T]:
        if self.failed or self._closed:
            raise EngineFailure("the engine has stopped; restart the server")
        return self._thread.submit(function)

    def cancel(self, requests: Sequence[int], sample: int | None = None) -> None:
        """Cancels a sample of requests, or all of them, before the next step."""

        def run() -> None:
            for request in requests:
                self.engine.cancel(request, sample)
            self._forget_ended(requests)

        with suppress(EngineFailure):
            self._submit(run)

    # -----------------------------------------------------------------------------------------------------------------
    # In the thread

    def _schedule_step(self) -> None:
        """Queues a step behind what has been submitted so far, as long as there are requests."""
        if self._owners and not self._step_is_scheduled and not self._closed:
            self._step_is_scheduled = True
            self._thread.submit(self._step)

    def _step(self) -> None:
        self._step_is_scheduled = False
        try:
            self._deliver(self.engine.step())
        except UserError as error:  # non-finite logits: the engine has dropped all requests and can continue
            logger.error("%s", error)
            self._fail_all(EngineFailure(str(error)))
        except Exception as error:
            logger.exception("the engine has failed")
            self.failed = not is_out_of_memory(error)
            remedy = "restart the server" if self.failed else "it ran out of memory: send fewer or shorter requests"
            self._fail_all(EngineFailure(f"the engine has failed; {remedy}"))
        self._schedule_step()

    def _deliver(self, events: list[TokenEvent]) -> None:
        batches: dict[Generation, list[Numbered]] = {}
        for event in events:
            generation, start = self._owners[event.request]
            batches.setdefault(generation, []).append((start + event.sample, event))
        self._forget_ended({event.request for event in events})
        self._send(batches)

    def _forget_ended(self, requests: Iterable[int]) -> None:
        for request in requests:
            if request not in self.engine.requests:
                self._owners.pop(request, None)

    def _fail_all(self, error: EngineFailure) -> None:
        batches = {generation: error for generation, _ in self._owners.values()}
        self._owners.clear()
        self._send(batches)

    def _close(self) -> None:
        for request in self._owners:
            self.engine.cancel(request)
        self._fail_all(EngineFailure("the server has shut down"))

    def _send(self, batches: Mapping[Generation, list[Numbered] | Exception]) -> None:
        def deliver() -> None:
            for generation, events in batches.items():
                generation.events.put_nowait(events)

        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(deliver)
