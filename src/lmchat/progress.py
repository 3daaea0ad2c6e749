"""Progress bars on stderr: tqdm's, which disappear when they are closed."""

import sys
import threading
from collections.abc import Iterable, Iterator
from typing import TextIO, TypeVar

from tqdm import tqdm

T = TypeVar("T")

LOG_SECONDS = 60.0
_SHARE_ONLY = "{l_bar}{bar}| [{elapsed}<{remaining}]"


class ProgressBar(tqdm):
    """A progress bar.

    Args:
        total: amount of work; None if unknown, which shows neither share nor time left.
        unit: e.g. ``documents``; ``B`` is shown as kB, MB and so on; without one only the share is shown.
        done: work done before, which does not count for the speed.
        log: if stderr is not a terminal, print a plain line every minute instead.
    """

    monitor_interval = 0  # no thread that redraws

    def __init__(
        self,
        description: str,
        total: float | None = None,
        *,
        unit: str = "",
        done: float = 0,
        enabled: bool = True,
        log: bool = True,
    ) -> None:
        stream = sys.stderr  # None if it is closed
        self._in_terminal = stream is not None and stream.isatty()
        seconds = 0.1 if self._in_terminal else LOG_SECONDS
        super().__init__(
            desc=description,
            total=total,
            unit=unit if unit == "B" else f" {unit}",
            unit_scale=unit == "B",
            initial=done,
            bar_format=None if unit else _SHARE_ONLY,
            file=stream if self._in_terminal else _Log(stream),
            disable=not enabled or stream is None or not (self._in_terminal or log),
            mininterval=seconds,
            delay=0 if self._in_terminal else seconds,
            miniters=0,
            dynamic_ncols=self._in_terminal,
            leave=False,
        )

    def set(self, done: float, description: str | None = None) -> None:
        """Sets the work done so far, and the description, if it is given."""
        self.update(done - self.n)
        if description is not None:
            self.set_description(description, refresh=self._in_terminal)

    def track(self, items: Iterable[T]) -> Iterator[T]:
        """Yields the items; each counts as done when the next one is requested."""
        for item in items:
            yield item
            self.update()


ProgressBar.set_lock(threading.RLock())  # tqdm's own is one between processes


class _Log:
    """A stream that prints what tqdm draws over the same line as lines."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        if line := text.strip():
            print(line, file=self._stream, flush=True)


def print_line(text: str) -> None:
    """Prints to stdout, above the progress bars if there are any."""
    ProgressBar.write(text, file=sys.stdout)
    sys.stdout.flush()


def clock_time(seconds: float) -> str:
    """``1h05m`` or ``3m07s``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"
