"""Files and folders that are there whole or not at all, and locks between processes.

All are written under a temporary name beside their own and then renamed, which POSIX does in one step.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from lmchat.types import UserError

TEMPORARY_SUFFIX = ".tmp"


@contextlib.contextmanager
def synced_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which becomes ``path`` when the block ends without an error and survives a power failure then.

    The temporary name is always the same, so that remains of a killed process are found: one writer at a time.
    """
    unfinished = path.with_name(path.name + TEMPORARY_SUFFIX)
    with _renamed(unfinished, path), unfinished.open("wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    sync_folder(path.parent)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """The name to write a file under, which becomes ``path`` when the block ends without an error."""
    unfinished = path.with_name(f"{path.name}.{os.getpid()}{TEMPORARY_SUFFIX}")
    with _renamed(unfinished, path):
        yield unfinished


@contextlib.contextmanager
def _renamed(unfinished: Path, path: Path) -> Iterator[None]:
    try:
        yield
        unfinished.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise


def sync_folder(directory: Path) -> None:
    """Makes renamings and deletions in a folder survive a power failure."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A folder to fill, which becomes ``output`` when the block ends without an error.

    Raises:
        UserError: ``output`` holds something already, or cannot be written.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"the output folder {output} is not empty; choose another with --output, or delete it")
    staging = output.with_name(f"{output.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    try:
        staging.mkdir(parents=True)
        yield staging
        staging.rename(output)
    except OSError as error:
        raise UserError(
            f"cannot write {error.filename or staging} ({error.strerror or error}); make room, give the folder write "
            "permission, or choose another"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def locked(path: Path, when_taken: Callable[[], Any]) -> Iterator[None]:
    """One process at a time. Where another one is in the block, calls ``when_taken``, then waits for it."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            when_taken()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
