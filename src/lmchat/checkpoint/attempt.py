"""Fencing: only the latest start of a run may write to its folder.

Each start of a run is an attempt with a unique name, which all ranks know and which is stored in the file ``.attempt``.
A rank that outlives its run, for example on a node that hung or lost the network, may wake up while a later attempt
writes to the same folder. Names of temporary files and receipts therefore contain the attempt, and a rank renames or
deletes files only while it holds a lock on ``.attempt`` and has read its own attempt there. `watch_attempt` ends a rank
that gets no further, as it may wait for a lost rank until the timeout of the process group.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lmchat.types import RankFailure, UserError

ATTEMPT_NAME = ".attempt"
TAKEOVER_TIMEOUT_SECONDS = 10.0
"""How long a new attempt waits for ranks of the previous one to rename a file, which takes milliseconds."""

WATCH_SECONDS = 10.0
"""Time between two looks at ``.attempt``."""

GRACE_SECONDS = 30.0
"""How long a process may take to end by itself after a later attempt has begun."""

_open_file = threading.RLock()
"""Held while ``.attempt`` is open: closing a file releases the locks of all threads on it."""

_begun: set[bytes] = set()
"""Names of the attempts that this process has begun."""


class Superseded(RankFailure):
    """A later attempt has begun; this process must no longer write to the folder."""


@dataclass(frozen=True)
class Attempt:
    """One start of a run.

    Attributes:
        directory: folder of the run's checkpoints.
        name: unique name, of letters and digits; "" if no other process can write to the folder.
    """

    directory: Path
    name: str

    @classmethod
    def begin(cls, directory: Path) -> Attempt:
        """Begins a new attempt; earlier ones can no longer write to ``directory``.

        Raises:
            UserError: a process of an earlier attempt is suspended during a rename.
            OSError: the folder cannot be written.
        """
        attempt = cls(directory, uuid.uuid4().hex[:12])
        _begun.add(attempt.name.encode())
        with _open_file, (directory / ATTEMPT_NAME).open("a+b") as file:
            _lock_exclusively(file.fileno(), directory)
            file.truncate(0)
            file.write(attempt.name.encode())
            file.flush()
            os.fsync(file.fileno())
        return attempt

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Context manager in which no other attempt can begin, for renaming or deleting files; keep it short.

        Raises:
            Superseded: another attempt has begun.
        """
        if not self.name:
            yield
            return
        path, ends = self.directory / ATTEMPT_NAME, "this process ends and writes nothing more"
        with _open_file, contextlib.ExitStack() as stack:
            try:
                file = stack.enter_context(path.open("rb"))
            except FileNotFoundError as error:
                raise Superseded(f"{path} is missing, so the run's folder or its files were removed; {ends}") from error
            with contextlib.suppress(OSError):  # a file system without locks; the run has warned at its start
                fcntl.lockf(file, fcntl.LOCK_SH)
            if file.read() != self.name.encode():
                raise Superseded(f"another attempt of this run is now writing to {self.directory}; {ends}")
            yield

    def check(self) -> None:
        """Raises Superseded if another attempt has begun."""
        with self.writing():
            pass


UNFENCED = Attempt(Path(), "")


def watch_attempt(attempt: Attempt) -> threading.Event:
    """Ends the process if a later attempt has begun and nothing else ends it; returns an event that ends the watch."""
    stopped = threading.Event()
    threading.Thread(target=_watch, args=(attempt, stopped), name="attempt watch", daemon=True).start()
    return stopped


def _watch(attempt: Attempt, stopped: threading.Event) -> None:
    path, seen = attempt.directory / ATTEMPT_NAME, None
    while not stopped.wait(WATCH_SECONDS):
        # Where the file cannot be read, the next write says so.
        with contextlib.suppress(OSError):
            if (changed := path.stat().st_mtime_ns) == seen:
                continue
            with _open_file:
                name = path.read_bytes()
            if name == attempt.name.encode():
                seen = changed
            elif name and name not in _begun:  # empty while it is written; a notebook may begin several attempts
                _end(attempt, stopped)


def _end(attempt: Attempt, stopped: threading.Event) -> None:
    """Ends the process, if it has not ended by itself after `GRACE_SECONDS`."""
    if stopped.wait(GRACE_SECONDS):
        return
    try:
        attempt.check()  # a network file system may have shown an old name
    except Superseded as error:
        print(f"lmchat: {error}", file=sys.stderr, flush=True)
        os._exit(1)


def _lock_exclusively(descriptor: int, directory: Path) -> None:
    begin = time.monotonic()
    while True:
        try:
            return fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            if time.monotonic() - begin > TAKEOVER_TIMEOUT_SECONDS:
                raise UserError(
                    f"a process of an earlier run is suspended while writing to {directory}; end that process "
                    "and start again"
                ) from error
            time.sleep(0.02)
        except OSError:
            return None  # a file system without locks
