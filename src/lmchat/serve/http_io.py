"""Reads request bodies and sends answers, with limits, and detects disconnected clients."""

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from lmchat.serve.engine_worker import EngineFailure, EngineWorker
from lmchat.serve.errors import APIError
from lmchat.serve.limits import Admission
from lmchat.serve.metrics import Metrics
from lmchat.serve.openai_responses import JSON, Responses
from lmchat.serve.run import Plan, Run
from lmchat.types import UserError

BODY_SECONDS = 30
"""Time a client has to send a body."""

logger = logging.getLogger(__name__)


async def read_body(request: Request, max_bytes: int) -> bytes:
    """Reads the body of a request.

    Raises:
        APIError: the body is not plain JSON, too large, or not complete within `BODY_SECONDS`.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # pages of other origins cannot send this without a preflight request
        raise APIError("the body must be JSON: set Content-Type to application/json", status=415)
    if (coding := request.headers.get("content-encoding", "identity").lower()) != "identity":
        raise APIError(f"the body has the content encoding {coding[:20]!r}; send it uncompressed", status=415)
    too_large = APIError(f"the body exceeds {max_bytes} bytes; shorten it", status=413, code="body_too_large")
    length = request.headers.get("content-length", "0")
    if length.isdecimal() and int(length[:20]) > max_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > max_bytes:
                    raise too_large
    except TimeoutError as error:
        raise APIError(f"the body did not arrive within {BODY_SECONDS} seconds", status=408) from error
    except ClientDisconnect as error:
        raise APIError("the client disconnected before the body was complete") from error
    return bytes(body)


@dataclass(eq=False)
class GeneratedResponse(Response):
    """Runs a plan and sends its answers, as one JSON object or as a stream of events, which may end with its usage.

    The run is cancelled if the client disconnects or the time limit is exceeded.
    """

    worker: EngineWorker
    admission: Admission
    metrics: Metrics
    plan: Plan
    responses: Responses
    stream: bool
    usage: bool
    background = None
    _begun = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        work = asyncio.ensure_future(self._respond(scope, receive, send))
        gone = asyncio.ensure_future(_disconnected(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                self.metrics.disconnects.inc()
        finally:
            work.cancel()
            gone.cancel()
            await asyncio.wait({work, gone})
        if not work.cancelled():
            work.result()

    async def _respond(self, scope: Scope, receive: Receive, send: Send) -> None:
        limits = self.admission.limits
        try:
            with self.admission.admit(len(self.plan.prompts) * self.plan.num_samples):
                async with asyncio.timeout(limits.max_seconds):
                    await self._run(scope, receive, send)
            return
        except APIError as raised:
            error = raised
        except UserError as raised:
            error = APIError(str(raised))
        except EngineFailure as raised:
            error = APIError(str(raised), status=500, code="engine_failure")
        except TimeoutError:
            message = f"the answer took longer than {limits.max_seconds:g} seconds; ask for fewer tokens"
            error = APIError(message, status=504, code="timeout")
        if not self._begun:
            await error.response(scope, receive, send)
        else:
            with suppress(TimeoutError):  # of a client that does not read
                async with asyncio.timeout(BODY_SECONDS):
                    await self._event(send, error.body)
                    await self._end(send)

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        run = Run(self.worker, self.plan, self.metrics)
        try:
            await run.start()
            if self.stream:
                await self._send_stream(run, send)
                return
            async for _ in run.deltas():
                pass
        finally:
            run.close()
        await JSONResponse(self.responses.whole(run))(scope, receive, send)

    async def _send_stream(self, run: Run, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-store")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        self._begun = True
        for chunk in self.responses.opening(run):
            await self._event(send, chunk)
        async for gained in run.deltas():
            chunks = (self.responses.chunk(run, number, delta) for number, delta in gained.items())
            if data := b"".join(_encode(chunk) for chunk in chunks if chunk):
                await send({"type": "http.response.body", "body": data, "more_body": True})
            for number in gained:  # sent tokens are not needed again; with log-probabilities they are large
                run.answers[number].whole.tokens.clear()
        if self.usage:
            await self._event(send, self.responses.usage_chunk(run))
        await self._end(send)

    async def _event(self, send: Send, data: JSON) -> None:
        await send({"type": "http.response.body", "body": _encode(data), "more_body": True})

    async def _end(self, send: Send) -> None:
        await send({"type": "http.response.body", "body": b"data: [DONE]\n\n", "more_body": False})


def _encode(data: JSON) -> bytes:
    """Encodes an event of a stream."""
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


async def _disconnected(receive: Callable[[], Awaitable[Any]]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
