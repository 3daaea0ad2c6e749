"""Middleware of all routes: checks of tokens and origins, and security headers for browsers."""

import hashlib
import hmac
import ipaddress
import logging
import secrets
from dataclasses import dataclass, field
from urllib.parse import SplitResult, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lmchat.serve.errors import APIError
from lmchat.serve.metrics import Metrics
from lmchat.types import UserError

logger = logging.getLogger(__name__)

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "Content-Security-Policy": CONTENT_SECURITY_POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), microphone=(), geolocation=()",
}
"""Headers of every response. There are no CORS headers, so pages of other origins cannot read answers."""


def is_loopback(host: str) -> bool:
    """Whether an address or name is on the loopback interface."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def check_api_key(key: str) -> str:
    """Returns the key.

    Raises:
        UserError: clients cannot send it as a bearer token.
    """
    if not key or not key.isascii() or not key.isprintable() or key != key.strip():
        raise UserError("the API key must have printable ASCII characters, at least one, and no spaces around them")
    return key


@dataclass(frozen=True, kw_only=True)
class Gate:
    """ASGI middleware: checks Host, Origin and bearer token, adds headers, counts responses, handles other exceptions.

    Args:
        app, metrics: the application, and the metrics that count its responses.
        public: paths that need no token.
        counted: paths that are counted by name.
        api_key: token that requests must have; None for none.
        loopback: whether the server listens on this machine only, so that the Host header must be this machine. This
            prevents DNS rebinding.
    """

    app: ASGIApp
    metrics: Metrics
    public: frozenset[str]
    counted: frozenset[str]
    api_key: str | None = field(repr=False)
    loopback: bool

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"] if scope["path"] in self.counted else "other"
        begun = False

        async def send_with_headers(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
                headers = MutableHeaders(scope=message)
                headers.update(HEADERS)
                headers["x-request-id"] = secrets.token_hex(8)
                self.metrics.requests.labels(path, str(message["status"])).inc()
            await send(message)

        try:
            self._check(scope["path"], Headers(scope=scope))
            await self.app(scope, receive, send_with_headers)
        except APIError as error:
            await error.response(scope, receive, send_with_headers)
        except Exception:
            logger.exception("%s %s failed", scope["method"], scope["path"])
            if begun:
                raise
            failure = APIError("the server failed; its log says why", status=500)
            await failure.response(scope, receive, send_with_headers)

    def _check(self, path: str, headers: Headers) -> None:
        """Raises APIError if the request is not allowed."""
        host = headers.get("host", "")
        if self.loopback and not is_loopback(_split(f"//{host}").hostname or ""):
            raise APIError("this server answers requests to this machine only; use localhost", status=403)
        origin = headers.get("origin")
        if origin is not None and _split(origin).netloc.lower() != host.lower():
            raise APIError("pages of other origins may not use this server", status=403)
        if self.api_key is None or path in self.public:
            return
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = _digest(token.strip().encode("latin-1", "replace"))
        if not hmac.compare_digest(given, _digest(self.api_key.encode())) or scheme.lower() != "bearer":
            raise APIError(
                "a valid bearer token is missing: send `Authorization: Bearer TOKEN`",
                status=401,
                kind="authentication_error",
                code="invalid_api_key",
            )


def _digest(token: bytes) -> bytes:
    """Digest of a token, so that comparisons take equal time for all lengths."""
    return hashlib.sha256(token).digest()


def _split(url: str) -> SplitResult:
    """The parts of a URL; those of an invalid one are empty."""
    try:
        return urlsplit(url)
    except ValueError:
        return urlsplit("")
