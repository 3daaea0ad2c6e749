"""Limits and checks of what a Hugging Face Hub answers, beyond those of huggingface_hub."""

import contextlib
import functools
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent import futures
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

from lmchat.hardware import mapped_and_resident_bytes
from lmchat.progress import ProgressBar
from lmchat.types import UserError

LISTING_SECONDS = 600.0
LISTING_BYTES = 800_000_000
"""Limits of a repository's list of files; a million files, at a thousand per request, take some five minutes."""
STALL_SECONDS = 600.0
"""Time without a new byte after which a download ends. A hub may ask its clients to come back in a day."""
POLL_SECONDS = 0.25

T = TypeVar("T")


@functools.cache
def guard_downloads() -> None:
    """Makes huggingface_hub raise `UserError` for unsafe ETags, and for files that do not end at their size.

    It names files of its cache after ETags, so that one with ``../`` in it would be written anywhere, and compares a
    file's size only after its end.
    """
    from huggingface_hub import __version__, file_download

    normalize, http_get = (getattr(file_download, name, None) for name in ("_normalize_etag", "http_get"))
    if normalize is None or http_get is None:
        raise UserError(f"lmchat does not know huggingface_hub {__version__}; install 2.4 or an older version")

    def checked(etag: str | None) -> str | None:
        name = normalize(etag)
        if name is not None and not (name.isprintable() and "/" not in name and "\\" not in name and len(name) < 200):
            raise UserError(f"the Hub sent the unsafe ETag {name!r:.200}; check HF_ENDPOINT")
        return name

    def bounded(url: str, temp_file: BinaryIO, *, expected_size: int | None = None, **options: Any) -> None:
        http_get(url, _Bounded(temp_file, expected_size, url), expected_size=expected_size, **options)

    file_download._normalize_etag = checked
    file_download.http_get = bounded


class EndlessFile(UserError):
    """A file goes on after its size."""


class _Bounded:
    """A file that takes only ``size`` bytes."""

    def __init__(self, file: BinaryIO, size: int | None, url: str) -> None:
        self._file = file
        self._size = size
        self._url = url

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, content: bytes) -> None:
        self._file.write(content)
        if self._size is not None and self._file.tell() > self._size:
            self._file.truncate(0)  # what is left of it would be continued by the next download
            raise EndlessFile(
                f"the Hub sends more than the {self._size:,} bytes of {self._url:.300}; check HF_ENDPOINT"
            )


class Session:
    """Requests about one repository: unsafe ETags are refused, and what does not end is given up.

    Args:
        what: the repository for messages.
    """

    def __init__(self, what: str) -> None:
        guard_downloads()
        self.what = what
        self.warnings = _RecentWarnings()

    def list_files(self, listing: Callable[[ProgressBar], T]) -> T:
        """Runs ``listing`` in a thread with limits on time and memory, since a response could be endless.

        A progress bar shows the time meanwhile, also where nothing arrives.

        Raises:
            UserError: it takes too long or too much memory.
        """
        with ProgressBar(f"Listing the files of {self.what}", unit="files") as bar:
            future = in_thread(lambda: listing(bar))
            deadline, before = time.monotonic() + LISTING_SECONDS, mapped_and_resident_bytes()[1]
            while not futures.wait([future], POLL_SECONDS).done:
                bar.update(0)
                grown = mapped_and_resident_bytes()[1] - before
                if time.monotonic() > deadline or grown > LISTING_BYTES:
                    seconds = LISTING_SECONDS - max(0, deadline - time.monotonic())
                    raise UserError(
                        f"the Hub's file list of {self.what} does not end: {grown / 1e6:.0f} MB of memory after "
                        f"{seconds:.0f} s{self.warnings}; check HF_ENDPOINT, or try again"
                    )
            return future.result()

    def download(
        self, actions: Sequence[Callable[[], T]], received: Callable[[], int], remedy: str = "try again"
    ) -> list[T]:
        """Runs ``actions`` in threads until all are done or one fails; ``received`` returns the bytes so far.

        Raises:
            UserError: ``received`` returns the same for `STALL_SECONDS`.
        """
        pending, before, deadline = [in_thread(action) for action in actions], -1, 0.0
        while (waited := futures.wait(pending, POLL_SECONDS, futures.FIRST_EXCEPTION)).not_done:
            for future in waited.done:
                future.result()
            if (now := received()) != before:
                before, deadline = now, time.monotonic() + STALL_SECONDS
            elif time.monotonic() > deadline:
                raise UserError(f"{self.what}: the hub sent nothing for {STALL_SECONDS:.0f} s{self.warnings}; {remedy}")
        return [future.result() for future in pending]


def file_sizes(*folders: Path) -> list[int]:
    """Sizes of the files below folders, some of which may vanish meanwhile."""
    sizes = []
    for directory, _, names in chain.from_iterable(map(os.walk, folders)):  # passes over folders that have vanished
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                sizes.append(Path(directory, name).stat().st_size)
    return sizes


class _RecentWarnings(logging.Handler):
    """Keeps the last warnings of huggingface_hub, which it logs before it repeats a request, and prints none."""

    def __init__(self) -> None:
        super().__init__()
        self._messages = deque[str](maxlen=2)
        logger = logging.getLogger("huggingface_hub")
        logger.handlers, logger.propagate = [self], False

    def emit(self, record: logging.LogRecord) -> None:
        self._messages.append(record.getMessage())

    def __str__(self) -> str:
        words = " ".join(self._messages).split()
        return f" (the last: {' '.join(words):.300})" if words else ""


def in_thread(action: Callable[[], T]) -> futures.Future[T]:
    """Runs ``action`` in a daemon thread, so that Ctrl-C does not wait for it."""
    future: futures.Future[T] = futures.Future()

    def work() -> None:
        try:
            future.set_result(action())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future
