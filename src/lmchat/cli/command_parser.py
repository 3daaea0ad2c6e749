"""The argument parser of all commands but the trainer's."""

from __future__ import annotations

import sys
from typing import Any

from jsonargparse import ArgumentParser


class CommandParser(ArgumentParser):
    """Raises the errors of printing a help, such as those of a full disk, which argparse ignores."""

    def _print_message(self, message: str, file: Any = None) -> None:
        (file or sys.stderr).write(message)
