"""Errors of the HTTP interface, in OpenAI's shape."""

from __future__ import annotations

from typing import Any


class APIError(Exception):
    """A request that is answered with an error.

    Args:
        message: what is wrong and what to do, for a person.
        status: HTTP status.
        kind: ``type`` of the error object; default follows from the status.
        code: machine-readable ``code``.
        param: the field that is at fault.
        retry_after: seconds after which the client may try again.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str | None = None,
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.kind = kind or ("invalid_request_error" if status < 500 else "server_error")
        self.code = code
        self.param = param
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        """The response's JSON."""
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Further headers of the response. Official clients retry timeouts and 500 by themselves unless told not to."""
        headers = {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
        return headers | ({"x-should-retry": "false"} if self.status in (408, 500, 504) else {})
