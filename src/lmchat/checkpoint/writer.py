"""Writes checkpoints atomically: after a crash the previous one is intact, and the new one complete or absent.

Every file is written under a temporary name, synced and renamed, and the folder is synced; ``meta`` is written last.
Each rank writes its optimizer file and then a small receipt; rank 0 waits for the receipts in the (shared) file system.
There are no collectives, so a failed rank cannot hang a save.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent import futures
from pathlib import Path
from typing import Any, BinaryIO

import torch

import lmchat
from lmchat.checkpoint.attempt import ATTEMPT_NAME, UNFENCED, Attempt
from lmchat.checkpoint.layout import LOCK_NAME, CheckpointPaths, committed_steps, files_by_step
from lmchat.files import TEMPORARY_SUFFIX, sync_folder, synced_file
from lmchat.types import UserError

logger = logging.getLogger(__name__)

FORMAT = 1
PEER_TIMEOUT_SECONDS = 1800.0
INTERRUPTED_PEER_TIMEOUT_SECONDS = 20.0
"""Timeout after an interruption, when all living ranks write at the same time.

Less than the 30 seconds after which torchrun kills the remaining ranks, so that rank 0 can report how the run ended.
"""
_PLAIN = (type(None), bool, int, float, str, bytes)


def snapshot(tree: Any, name: str = "checkpoint") -> Any:
    """Copies a tree of tensors and plain values to CPU memory, independent of further training.

    Raises:
        TypeError: a leaf would be refused by a safe loader (``weights_only=True``). The message has its path.
    """
    if isinstance(tree, torch.Tensor):
        return tree.detach().to("cpu", copy=True)
    if isinstance(tree, Mapping):
        return {key: snapshot(value, f"{name}[{key!r}]") for key, value in tree.items()}
    if type(tree) in (list, tuple):
        return type(tree)(snapshot(value, f"{name}[{index}]") for index, value in enumerate(tree))
    if type(tree) in _PLAIN:
        return tree
    raise TypeError(f"{name} is a {type(tree).__name__}; checkpoints hold tensors and plain Python values only")


def write_file(path: Path, write: Callable[[BinaryIO], Any], attempt: Attempt = UNFENCED) -> dict[str, Any]:
    """Writes ``path`` atomically; ``write`` writes the content to the given file object.

    Returns:
        Size (``bytes``) and ``sha256``, in hexadecimal, of the file, as ``meta`` lists them.

    Raises:
        UserError: the file cannot be written, e.g. because the disk is full; no partial file remains.
        Superseded: another attempt than ``attempt`` has begun; no partial file remains.
    """
    try:
        attempt.check()
        with synced_file(path, attempt.name, attempt.writing) as file:
            write(file)
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            return {"bytes": file.tell(), "sha256": digest}
    except OSError as error:
        raise UserError(_cannot_write(path, error)) from error


def _cannot_write(path: Path, error: OSError) -> str:
    steps = committed_steps(path.parent)
    kept = f"the newest complete checkpoint is {CheckpointPaths(path.parent, steps[-1]).meta}" if steps else ""
    remedy = "free some space or choose another folder"
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        remedy = "make the folder writable or choose another one"
    return f"cannot write {path}: {error.strerror or error}; {remedy}" + (f" ({kept})" if kept else "")


def write_checkpoint(
    paths: CheckpointPaths,
    *,
    model: Mapping[str, torch.Tensor],
    rank_state: Mapping[str, Any],
    meta: Mapping[str, Any],
    rank: int = 0,
    world_size: int = 1,
    attempt: Attempt = UNFENCED,
    peer_timeout_seconds: Callable[[], float] = lambda: PEER_TIMEOUT_SECONDS,
) -> None:
    """Writes one rank's part of a checkpoint; on rank 0 it returns when the whole checkpoint is complete.

    Args:
        paths: folder and optimizer step.
        model: state dict of the GPT; written by rank 0.
        rank_state: optimizer state, RNG state and data position of this rank: tensors and plain values.
        meta: JSON values that describe the checkpoint, at least ``stage``; written by rank 0.
        peer_timeout_seconds: returns how long rank 0 waits for the other ranks' files; called while it waits.

    Raises:
        UserError: a file cannot be written, or another rank has not written its file in time.
        Superseded: another attempt than ``attempt`` has begun.
    """
    if rank == 0:
        with attempt.writing():
            _uncommit(paths)
    records = {paths.optimizer(rank).name: _save_tensors(paths.optimizer(rank), rank_state, attempt)}
    if rank != 0:
        _save_json(paths.receipt(rank, attempt.name), records, attempt)
        return
    records[paths.model.name] = _save_tensors(paths.model, model, attempt)
    receipts = [paths.receipt(peer, attempt.name) for peer in range(1, world_size)]
    for receipt in receipts:
        records |= _await_receipt(receipt, peer_timeout_seconds)
    own = {
        "format": FORMAT,
        "lmchat_version": lmchat.__version__,
        "step": paths.step,
        "world_size": world_size,
        "saved_at": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "files": records,
    }
    assert not own.keys() & meta.keys(), f"reserved names in meta: {own.keys() & meta.keys()}"
    content = {**own, **meta}
    _save_json(paths.meta, {**content, "meta_sha256": json_digest(content)}, attempt)
    for receipt in receipts:
        receipt.unlink(missing_ok=True)


def mark_evaluated(paths: CheckpointPaths, attempt: Attempt = UNFENCED) -> None:
    """Notes in ``meta`` that the checkpoint's step has been evaluated; a run that resumes from it does not repeat that.

    Does nothing if there is no such checkpoint, as in a run that has resumed from another folder.

    Raises:
        UserError: the file cannot be written.
        Superseded: another attempt than ``attempt`` has begun.
    """
    if not paths.meta.exists():
        return
    meta = json.loads(paths.meta.read_bytes())
    del meta["meta_sha256"]
    meta["evaluated"] = True
    _save_json(paths.meta, {**meta, "meta_sha256": json_digest(meta)}, attempt)


def _save_tensors(path: Path, tree: Mapping[str, Any], attempt: Attempt) -> dict[str, Any]:
    def write(file: BinaryIO) -> None:
        try:
            torch.save(dict(tree), file)
        except RuntimeError as error:
            raise error.__context__ or error from None  # torch replaces an error of the file

    return write_file(path, write, attempt)


def _save_json(path: Path, value: Mapping[str, Any], attempt: Attempt) -> dict[str, Any]:
    return write_file(path, lambda file: file.write(json.dumps(value, indent=1, allow_nan=False).encode()), attempt)


def json_digest(value: Mapping[str, Any]) -> str:
    """SHA-256 of a JSON value, independent of formatting; stored as ``meta_sha256`` in ``meta``."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _await_receipt(receipt: Path, timeout_seconds: Callable[[], float]) -> dict[str, Any]:
    if not _appears(receipt, timeout_seconds):
        raise UserError(
            f"{receipt.name} did not appear in {receipt.parent} within {timeout_seconds():g} s, so the checkpoint "
            "stays incomplete; that rank failed, or the folder is not on a file system that all ranks share"
        )
    return json.loads(receipt.read_bytes())


def await_commit(paths: CheckpointPaths, timeout_seconds: float) -> None:
    """Waits until rank 0 has completed the checkpoint, or for the timeout."""
    _appears(paths.meta, lambda: timeout_seconds)


def _appears(path: Path, timeout_seconds: Callable[[], float]) -> bool:
    begin = time.monotonic()
    while not path.exists():
        if time.monotonic() - begin > timeout_seconds():
            return False
        time.sleep(0.02)
    return True


def _uncommit(paths: CheckpointPaths) -> None:
    """Deletes ``meta``, so that the checkpoint no longer exists even if other files remain."""
    if paths.meta.exists():
        paths.meta.unlink()
        sync_folder(paths.directory)


def prune(newest: CheckpointPaths, keep_last: int, attempt: Attempt = UNFENCED) -> None:
    """Keeps the last ``keep_last`` complete checkpoints up to ``newest`` and deletes older ones, ``meta`` first.

    Raises:
        Superseded: another attempt than ``attempt`` has begun.
    """
    assert keep_last >= 1
    with attempt.writing():
        files = files_by_step(newest.directory)
        older = [step for step in committed_steps(newest.directory) if step <= newest.step]
        for step in older[:-keep_last]:
            _uncommit(CheckpointPaths(newest.directory, step))
            for path in files[step]:
                path.unlink(missing_ok=True)


def check_writable(directory: Path, rank: int = 0) -> None:
    """Raises UserError if ``rank`` cannot write files to the folder."""
    probe = directory / f".probe_rank{rank}"
    write_file(probe, lambda file: file.write(b"writable"))
    probe.unlink()


@contextlib.contextmanager
def run_lock(directory: Path) -> Iterator[Attempt]:
    """Locks a folder of checkpoints, and begins a new attempt, so that surviving ranks of an earlier run cannot write.

    The folder is created if missing; partial files of interrupted writes are removed. The end of the process releases
    the lock, too.

    Raises:
        UserError: the folder cannot be created or written, or another run has locked it.
    """
    path = directory / LOCK_NAME
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file = path.open("a+")
    except OSError as error:
        raise UserError(_cannot_write(path, error)) from error
    with file:
        try:
            # A POSIX record lock: unlike flock, it is not kept by worker processes that outlive a killed run.
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise UserError(
                f"{directory} is in use by another run ({holder}); wait for it, stop it, or choose another folder"
            ) from error
        except OSError as error:
            logger.warning(
                "%s cannot be locked (%s): a second run that writes to it will not be refused", directory, error
            )
        check_writable(directory)
        try:
            attempt = Attempt.begin(directory)
        except OSError as error:
            raise UserError(_cannot_write(directory / ATTEMPT_NAME, error)) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        _remove_remains(directory)
        yield attempt


def _remove_remains(directory: Path) -> None:
    committed = set(committed_steps(directory))
    for step, files in files_by_step(directory).items():
        for path in files:
            if step not in committed or path.name.startswith("receipt_") or path.suffix == TEMPORARY_SUFFIX:
                path.unlink(missing_ok=True)


class BackgroundWriter:
    """Runs writes in a thread, one after the other. The interpreter does not exit before they are done."""

    def __init__(self) -> None:
        self._pool = futures.ThreadPoolExecutor(1, "checkpoint writer")
        self._jobs: list[futures.Future[None]] = []

    def start(self, job: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        """Runs ``job`` with the arguments after those in progress."""
        self._jobs.append(self._pool.submit(job, *args, **kwargs))

    def check(self) -> None:
        """Raises the error of finished jobs; does not wait."""
        if all(job.done() for job in self._jobs):
            self.wait()

    def wait(self) -> None:
        """Waits for the jobs in progress and raises the first error."""
        futures.wait(self._jobs)
        jobs, self._jobs = self._jobs, []
        for job in jobs:
            job.result()
