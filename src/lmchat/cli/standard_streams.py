"""Standard input, output and error of every command: closed ones, broken pipes and terminals without Unicode."""

from __future__ import annotations

import contextlib
import io
import os
import select
import signal
import sys

BROKEN_PIPE_STATUS = 128 + signal.SIGPIPE
"""The exit status that shells report of a program which a broken pipe ended."""


def prepare_standard_streams() -> None:
    """Replaces closed streams by the null device, and lets no character fail to be printed or read.

    What the terminal's encoding lacks is printed as an escape like ``\\xe9``; invalid input is read as U+FFFD.
    """
    # Otherwise the next file opened would take the number of a closed standard stream, and its output with it.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115
    for stream, errors in ((sys.stdin, "replace"), (sys.stdout, "backslashreplace"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
            stream.reconfigure(errors=errors)


def is_broken_output(error: BaseException) -> bool:
    """Whether ``error`` says that nobody reads standard output or error any longer, as after ``| head -1``."""
    if isinstance(error, SystemExit):
        return isinstance(error.__context__, BrokenPipeError)  # by rich, which has replaced the stream already
    return isinstance(error, BrokenPipeError) and any(_has_no_reader(number) for number in (1, 2))


def _has_no_reader(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def discard_output() -> None:
    """Sends standard output to the null device, so that Python's flush at exit does not fail."""
    null = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        if _has_no_reader(number):
            os.dup2(null, number)
    os.close(null)
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
