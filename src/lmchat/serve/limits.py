"""Limits of a server: sizes, lengths, concurrent requests."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from lmchat.option_checks import check_count
from lmchat.serve.errors import APIError
from lmchat.types import UserError


@dataclass(frozen=True)
class Limits:
    """Limits of a server; None is the model's limit. A request takes ``max_seconds`` at most, including waiting.

    Raises:
        UserError: a value is out of range.
    """

    max_running: int = 64
    max_queued: int = 256
    max_prompt_tokens: int | None = None
    max_new_tokens: int | None = None
    max_body_bytes: int = 1_000_000
    max_seconds: float = 300.0

    def __post_init__(self) -> None:
        counts = {name: value for name, value in vars(self).items() if name != "max_seconds"}
        check_count("", 0, max_queued=counts.pop("max_queued"))
        check_count("", 1, **counts)
        if not 0 < self.max_seconds <= 1e6:
            raise UserError(f"--max_seconds is {self.max_seconds}; give a number of seconds, for example 300")


class Admission:
    """Counts the completions of open requests and refuses those that exceed the limits.

    Attributes:
        capacity: maximum number of completions of open requests.
        open: number of completions of admitted, unfinished requests.
        draining: whether the server is shutting down and admits nothing.
    """

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.capacity = limits.max_running + limits.max_queued
        self.open = 0
        self.draining = False

    def check(self, completions: int) -> None:
        """Refuses requests that can never be admitted, before work is spent on them.

        Raises:
            APIError: the server's capacity is smaller than ``completions``.
        """
        if completions > self.capacity:
            raise APIError(
                f"a request of {completions} completions exceeds this server's {self.capacity}; ask for fewer"
            )

    @contextmanager
    def admit(self, completions: int) -> Iterator[None]:
        """Context manager that reserves places for ``completions``.

        Raises:
            APIError: the server is full or shutting down.
        """
        if self.draining:
            raise APIError("the server is shutting down", status=503, code="shutting_down", retry_after=5)
        if self.open + completions > self.capacity:
            raise APIError(
                f"the server is full: {self.open} of {self.capacity} completions are running or waiting; try later",
                status=429,
                kind="rate_limit_error",
                code="server_full",
                retry_after=1,
            )
        self.open += completions
        try:
            yield
        finally:
            self.open -= completions
