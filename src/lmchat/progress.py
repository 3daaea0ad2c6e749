"""Progress bars on stderr: one line that is redrawn, with the share done, the amount, the speed and the time left.

If stderr is not a terminal, nothing is drawn; a plain line is printed every minute instead, for logs.
"""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Self, TextIO, TypeVar

T = TypeVar("T")

REDRAW_SECONDS = 0.1
LOG_SECONDS = 60.0
_BAR_WIDTH = 30
_MIN_BAR_WIDTH = 8
_PREFIXES = ("", "k", "M", "G", "T")

_live: list[ProgressBar] = []
"""Open bars; only the last one is drawn."""


class ProgressBar(contextlib.AbstractContextManager["ProgressBar"]):
    """A progress bar, which disappears when it is closed.

    Args:
        description: text before the bar.
        total: amount of work; None if unknown, which shows neither share nor time left.
        unit: unit of the amounts, e.g. ``documents``; ``B`` is shown as kB, MB and so on.
        done: work done before, which does not count for the speed.
        enabled: False shows nothing.
        log: print a line every minute if the stream is not a terminal.
        stream: where to draw, by default ``sys.stderr``.
        clock: seconds from any origin; for tests.
    """

    def __init__(
        self,
        description: str,
        total: float | None = None,
        *,
        unit: str = "",
        done: float = 0,
        enabled: bool = True,
        log: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.description = description
        self.total = total
        self.done = self._initial = done
        self._unit = unit
        self._stream = stream or sys.stderr
        self._clock = clock
        self._start = self._shown_at = clock()
        self._eta: float | None = None
        self._drawn = False
        # A closed standard stream is None in Python.
        self._terminal = enabled and self._stream is not None and self._stream.isatty()
        self._log = enabled and log and self._stream is not None and not self._terminal
        if self._terminal:
            _live.append(self)
            self.draw()

    def advance(self, amount: float = 1) -> None:
        """Adds to the work done."""
        self.set(self.done + amount)

    def set(self, done: float, *, description: str | None = None, eta_seconds: float | None = None) -> None:
        """Sets the work done so far.

        Args:
            done: amount of work done.
            description: replaces the description.
            eta_seconds: time left; by default the remaining work at the mean speed so far.
        """
        self.done = done
        self.description = self.description if description is None else description
        self._eta = eta_seconds
        waited = self._clock() - self._shown_at
        if self._terminal and (waited >= REDRAW_SECONDS or description is not None):
            self.draw()
        elif self._log and waited >= LOG_SECONDS:
            self._shown_at = self._clock()
            print(self.line(bar_width=0), file=self._stream, flush=True)

    def track(self, items: Iterable[T]) -> Iterator[T]:
        """Yields the items; each counts as done when the next one is requested."""
        for item in items:
            yield item
            self.advance()

    def line(self, bar_width: int = _BAR_WIDTH) -> str:
        """Description, bar, share, amount, speed and time left, as far as they are known.

        Args:
            bar_width: width of the bar in characters; 0 leaves it out.
        """
        done, seconds = self.done, self._clock() - self._start
        rate = (done - self._initial) / seconds if seconds > 0 else 0.0
        parts = [self.description]
        if self.total:
            share = min(done / self.total, 1.0)
            parts += [self._bar(share, bar_width)] if bar_width else []
            parts += [f"{100 * share:.0f} %"]
        parts.append(self._amount())
        if rate and self._unit:
            parts.append(f"{_scaled(rate, self._unit)}/s")
        eta = self._eta
        if eta is None and self.total and rate > 0:
            eta = max(self.total - done, 0) / rate
        if eta is not None:
            parts.append(f"{clock_time(eta)} left")
        elif not self.total and seconds >= 1:
            parts.append(clock_time(seconds))
        return "  ".join(part for part in parts if part)

    def _amount(self) -> str:
        if not self._unit:
            return ""
        if not self.total:
            return _scaled(self.done, self._unit)
        done = _scaled(self.done, "B") if self._unit == "B" else f"{self.done:,.0f}"
        return f"{done} of {_scaled(self.total, self._unit)}"

    def _bar(self, share: float, width: int) -> str:
        full, empty = "━─" if _can_encode(self._stream, "━─") else "#-"
        filled = round(share * width)
        return full * filled + empty * (width - filled)

    def draw(self) -> None:
        """Draws the line now, cut to the width of the terminal."""
        if not self._terminal or _live[-1] is not self:
            return
        columns = shutil.get_terminal_size().columns - 1
        line = self.line()
        if len(line) > columns:
            line = self.line(max(_MIN_BAR_WIDTH, _BAR_WIDTH - (len(line) - columns)))[:columns]
        self._stream.write(f"\r{line}\x1b[K")
        self._stream.flush()
        self._drawn, self._shown_at = True, self._clock()

    def clear(self) -> None:
        """Removes the line from the terminal until it is drawn again."""
        if self._drawn:
            self._stream.write("\r\x1b[K")
            self._stream.flush()
            self._drawn = False

    def close(self) -> None:
        """Removes the bar for good."""
        if self in _live:
            self.clear()
            _live.remove(self)
        self._terminal = self._log = False

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def print_line(text: str) -> None:
    """Prints to stdout, above the progress bar if there is one."""
    if _live:
        _live[-1].clear()
    print(text, flush=True)
    if _live:
        _live[-1].draw()


def clock_time(seconds: float) -> str:
    """``1h05m`` or ``3m07s``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02d}m" if hours else f"{minutes}m{rest:02d}s"


def _scaled(amount: float, unit: str) -> str:
    """``1.5 MB`` or ``1,500 documents``."""
    if unit != "B":
        return f"{amount:,.0f} {unit}"
    for prefix in _PREFIXES:
        if amount < 999.5 or prefix == _PREFIXES[-1]:
            break
        amount /= 1000
    return f"{amount:.3g} {prefix}B"


def _can_encode(stream: TextIO, text: str) -> bool:
    try:
        text.encode(getattr(stream, "encoding", None) or "ascii")
    except (UnicodeEncodeError, LookupError):
        return False
    return True
