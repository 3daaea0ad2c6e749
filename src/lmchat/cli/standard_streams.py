"""Handles closed standard streams, broken pipes and terminals without Unicode."""

import io
import os
import select
import signal
import sys

BROKEN_PIPE_STATUS = 128 + signal.SIGPIPE
"""Exit status of a program ended by SIGPIPE, as reported by shells."""


def prepare_standard_streams() -> None:
    """Replaces closed streams by the null device, and makes printing and reading never fail because of encodings.

    Characters that the terminal's encoding lacks are printed as escapes like ``\\xe9``; invalid input becomes U+FFFD.
    """
    # Otherwise the next opened file would get the descriptor of a closed stream, and its output.
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
    """Whether ``error`` means that the reader of standard output or error has exited, as after ``| head -1``."""
    if isinstance(error, SystemExit):
        return isinstance(error.__context__, BrokenPipeError)  # raised by rich, which has replaced the stream
    return isinstance(error, BrokenPipeError) and any(_has_no_reader(number) for number in (1, 2))


def _has_no_reader(descriptor: int) -> bool:
    poll = select.poll()
    poll.register(descriptor, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def discard_output() -> None:
    """Redirects output that cannot be written to the null device, so that Python's flush at exit does not fail."""
    null = os.open(os.devnull, os.O_WRONLY)
    for number, stream in ((1, sys.stdout), (2, sys.stderr)):
        if _has_no_reader(number):
            os.dup2(null, number)
        try:
            stream.flush()
        except OSError:  # such as a full disk; what is buffered would be written again
            os.dup2(null, number)
            stream.flush()
        except ValueError:
            continue
    os.close(null)
