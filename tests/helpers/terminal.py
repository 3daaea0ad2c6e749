"""A terminal to draw progress bars in."""

from __future__ import annotations

import io


class Terminal(io.StringIO):
    """Standard error as a terminal, which keeps what was written."""

    encoding = "utf-8"

    def isatty(self) -> bool:
        return True

    def screen(self) -> str:
        """The line that a terminal shows."""
        return self.getvalue().rstrip().rpartition("\r")[2]
