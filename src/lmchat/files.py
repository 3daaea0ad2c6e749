"""Atomic writes of files and folders, and locks between processes.

Files are written under a temporary name in the same folder and then renamed, which is atomic on POSIX.
"""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from io import BufferedRandom
from pathlib import Path
from typing import Any

from lmchat.types import UserError

TEMPORARY_SUFFIX = ".tmp"


@contextlib.contextmanager
def synced_file(
    path: Path,
    writer: str = "",
    renaming: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
) -> Iterator[BufferedRandom]:
    """Opens a file that becomes ``path`` when the block ends without an error, and is then durable (fsync).

    The temporary name is fixed, so that a later write replaces the remains of a killed process: one writer at a time.

    Args:
        path: file to write.
        writer: name of the writer, added to the temporary name.
        renaming: returns a context manager for the rename; an error in it cancels the write.
    """
    with replacing(path, f".{writer}" if writer else "", renaming) as unfinished, unfinished.open("w+b") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    sync_folder(path.parent)


@contextlib.contextmanager
def replacing(
    path: Path,
    mark: str | None = None,
    renaming: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext,
) -> Iterator[Path]:
    """Yields a temporary path that is renamed to ``path`` when the block ends without an error.

    ``mark`` is a part of its name, by default the process's number; see `synced_file` for ``renaming``.
    """
    unfinished = path.with_name(f"{path.name}{f'.{os.getpid()}' if mark is None else mark}{TEMPORARY_SUFFIX}")
    try:
        with naming_errors(path):
            yield unfinished
        with renaming():
            unfinished.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            unfinished.unlink()
        raise


def json_object(text: str | bytes) -> dict[str, Any]:
    """Parses a JSON object. Raises ValueError for any other text."""
    try:
        content = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not isinstance(content, dict):
        raise ValueError(f"it is of type {type(content).__name__}, not a JSON object")
    return content


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Replaces ``path`` by a file with ``content``, indented."""
    with replacing(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=2) + "\n")


@contextlib.contextmanager
def naming_errors(path: Path) -> Iterator[None]:
    """Adds ``path`` to errors that name no file, like those of a write to a full disk."""
    try:
        yield
    except OSError as error:
        error.filename = str(path) if error.filename is None else os.fsdecode(error.filename)
        raise


def sync_folder(directory: Path) -> None:
    """Makes renames and deletions in a folder durable (fsync)."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """Yields a temporary folder that is renamed to ``output`` when the block ends without an error.

    After an error the folders above it that were made for it are removed, too.

    Raises:
        UserError: ``output`` is not empty, or cannot be written.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"the output folder {output} is not empty; choose another with --output, or delete it")
    staging = output.with_name(f"{output.name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    made: list[Path] = []
    try:
        made += [folder for folder in staging.parents if not folder.exists()]
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
        with contextlib.suppress(OSError):  # the first of them that is not empty, or was not made
            for folder in made:
                folder.rmdir()


@contextlib.contextmanager
def locked(path: Path, when_taken: Callable[[], Any]) -> Iterator[None]:
    """Holds an exclusive lock between processes; calls ``when_taken`` before waiting for another holder."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            when_taken()
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
