"""Errors of the HTTP interface, in OpenAI's shape."""

from dataclasses import KW_ONLY, dataclass
from typing import Any

from starlette.responses import JSONResponse, Response


@dataclass(eq=False)
class APIError(Exception):
    """A request that is answered with an error: a message with problem and remedy, and an HTTP status.

    Args:
        kind: ``type`` of the error object; the default depends on the status.
        code: machine-readable ``code``.
        param: name of the invalid field.
        retry_after: seconds after which the client may retry.
    """

    message: str
    _: KW_ONLY
    status: int = 400
    kind: str | None = None
    code: str | None = None
    param: str | None = None
    retry_after: int | None = None

    @property
    def body(self) -> dict[str, Any]:
        """The response's JSON."""
        kind = self.kind or ("invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def response(self) -> Response:
        """The response. By default, OpenAI's clients retry after timeouts and status 500."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        headers |= {"x-should-retry": "false"} if self.status in (408, 500, 504) else {}
        return JSONResponse(self.body, status_code=self.status, headers=headers)
