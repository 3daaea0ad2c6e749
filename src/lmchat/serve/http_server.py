"""Runs the application with uvicorn until SIGINT or SIGTERM, then finishes open requests."""

import asyncio
import os
import resource
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from lmchat.serve import http_io
from lmchat.serve.app import Server
from lmchat.serve.errors import APIError
from lmchat.types import UserError

HEADER_SECONDS = 20
"""Time a client has to send the head of a request."""

UNREAD_SECONDS = 60
"""Time after which a connection is closed (on Linux) whose client reads nothing while there is something to read."""

MAX_FILES = 4096
"""Open files of the process, if its hard limit allows them. Each connection takes one."""

BACKLOG = 256
"""Connections accepted at a time, before surplus ones are closed."""


def raise_file_limit() -> None:
    """Raises the soft limit of open files; it is often 1,024, or 256."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, min(hard, MAX_FILES)), hard))


def max_connections() -> int:
    """Maximum number of open connections. Without free files, asyncio logs 10,000 lines per second."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0] * 3 // 4


def open_socket(host: str, port: int) -> socket.socket:
    """Opens a listening socket.

    Raises:
        UserError: the address is in use or not an address of this machine, or the port is invalid.
    """
    if not 0 <= port < 2**16:
        raise UserError(f"--port is {port}; give a number from 0 to 65535")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        # asyncio sends small packets immediately (TCP_NODELAY) only if the socket's protocol is given.
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if sys.platform == "linux":  # inherited by connections
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(1000 * UNREAD_SECONDS))
        listener.bind(address)
        listener.listen(BACKLOG)
    except (OSError, UnicodeError) as error:  # UnicodeError of a name that is no host's
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"cannot listen on {host} port {port}: {reason}; give another --host or --port") from error
    return listener


class _Protocol(H11Protocol):
    """HTTP/1.1 that closes connections on which a request does not arrive in time, and surplus ones."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()
        if len(self.connections) > max_connections():
            transport.abort()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def send_400_response(self, msg: str) -> None:
        """Answers bytes that are not HTTP, unless an answer has begun, and closes the connection."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            response = APIError("the request is not valid HTTP").response
            headers = [*response.raw_headers, (b"connection", b"close")]
            for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=bytes(response.body))):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _watch(self) -> None:
        """Starts the timer with the first byte of a request, and stops it with the last of its head."""
        is_idle = self.cycle is None or self.cycle.response_complete
        if is_idle and self._timer is None:
            self._timer = self.loop.call_later(HEADER_SECONDS, self.transport.close)
        elif not is_idle and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)


class _Uvicorn(uvicorn.Server):
    """Leaves the signal handlers to `run_server`."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def uvicorn_config(server: Server) -> uvicorn.Config:
    return uvicorn.Config(
        server.app,
        http=_Protocol,
        access_log=False,
        log_level="warning",
        server_header=False,
        ws="none",
        backlog=BACKLOG,
        timeout_graceful_shutdown=int(server.limits.max_seconds + http_io.BODY_SECONDS) + 1,
    )


def run_server(server: Server, listener: socket.socket) -> None:
    """Serves until SIGINT or SIGTERM, then finishes open requests only. A second signal exits at once."""
    running = _Uvicorn(uvicorn_config(server))

    def stop(number: int, frame: object) -> None:
        if running.should_exit:
            os._exit(128 + number)  # cancelled requests would print tracebacks
        server.admission.draining = running.should_exit = True

    raise_file_limit()
    # Before the event loop starts: with Python's own handler, asyncio would cancel the server at SIGINT.
    earlier = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        running.run(sockets=[listener])
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)
