"""Which start of a run may write into its folder.

Each start of a run on a folder is an attempt with a name of its own, which is in the file ``.attempt`` and which every
rank knows. A rank that outlives its run, because its node hung or lost the network, may wake up while a later attempt
writes to the same folder. So names of temporary files and receipts contain the attempt, and a rank renames or deletes
files only while it holds a lock on ``.attempt`` and has read its own attempt there.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from lmchat.types import RankFailure, UserError

ATTEMPT_NAME = ".attempt"
TAKEOVER_TIMEOUT_SECONDS = 10.0
"""How long a new attempt waits for ranks of the one before that rename a file, which takes milliseconds."""


class Superseded(RankFailure):
    """Another attempt writes to the folder now; this process must not."""


@dataclass(frozen=True)
class Attempt:
    """One start of a run.

    Attributes:
        directory: folder of the run's checkpoints.
        name: identity, in letters and digits.
    """

    directory: Path
    name: str

    @classmethod
    def begin(cls, directory: Path) -> Attempt:
        """A new attempt, which ends the right of all earlier ones to write to ``directory``.

        Raises:
            UserError: a process of an earlier attempt is stopped in the middle of a rename.
            OSError: the folder cannot be written.
        """
        attempt = cls(directory, uuid.uuid4().hex[:12])
        with (directory / ATTEMPT_NAME).open("a+b") as file:
            _lock_exclusively(file.fileno(), directory)
            file.truncate(0)
            file.write(attempt.name.encode())
            file.flush()
            os.fsync(file.fileno())
        return attempt

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Keeps other attempts from beginning while the block renames or deletes files; keep it short.

        Raises:
            Superseded: another attempt has begun.
        """
        try:
            file = (self.directory / ATTEMPT_NAME).open("rb")
        except FileNotFoundError as error:
            raise Superseded(
                f"{self.directory / ATTEMPT_NAME} is gone, so somebody has removed the run's folder or its files; this "
                "process ends and writes nothing more"
            ) from error
        with file:
            with contextlib.suppress(OSError):  # a file system without locks; the run has warned when it began
                fcntl.lockf(file, fcntl.LOCK_SH)
            if file.read() != self.name.encode():
                raise Superseded(
                    f"another attempt of this run writes to {self.directory} now; this process ends and writes nothing "
                    "more"
                )
            yield

    def check(self) -> None:
        """Raises Superseded where another attempt has begun."""
        with self.writing():
            pass


def _lock_exclusively(descriptor: int, directory: Path) -> None:
    begin = time.monotonic()
    while True:
        try:
            return fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            if time.monotonic() - begin > TAKEOVER_TIMEOUT_SECONDS:
                raise UserError(
                    f"a process of an earlier run is stopped in the middle of a write to {directory}; end that process "
                    "and start again"
                ) from error
            time.sleep(0.02)
        except OSError:
            return None  # a file system without locks
