"""Callbacks that inject faults into runs of `lmchat fit` or record their batches."""

from __future__ import annotations

import ctypes
import hashlib
import os
import resource
import signal
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

CLONE_NEWNS, MS_RDONLY, MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 0x20000, 1, 32, 4096, 1 << 14, 1 << 18


def _signal(name: str) -> Any:
    return lambda: os.kill(os.getpid(), getattr(signal, name))


def _fill_disk() -> None:
    """Makes writes fail, in this process, for files of 20 kB or more."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))


def _mount(*calls: tuple[Any, ...]) -> None:
    """Calls functions of libc, which return 0 on success."""
    libc = ctypes.CDLL(None, use_errno=True)
    for name, *arguments in calls:
        assert not getattr(libc, name)(*arguments), os.strerror(ctypes.get_errno())


def _own_mounts() -> None:
    """Gives this process mounts of its own, which threads that start later share."""
    _mount(("unshare", CLONE_NEWNS), ("mount", None, b"/", None, MS_PRIVATE | MS_REC, None))


def _make_read_only() -> None:
    """Makes the checkpoint folder read-only for this process, except for files that are open."""
    folder = Path(os.environ["LMCHAT_BASE_DIR"]) / "base_checkpoints" / "d2"
    folder.mkdir(parents=True, exist_ok=True)
    path = os.fsencode(folder)
    read_only = MS_BIND | MS_REMOUNT | MS_RDONLY
    _mount(("mount", path, path, None, MS_BIND, None), ("mount", None, path, None, read_only, None))


def _raise(error: Exception) -> Any:
    def fail() -> None:
        raise error

    return fail


DEEDS = {
    "SIGTERM": _signal("SIGTERM"),
    "SIGUSR1": _signal("SIGUSR1"),
    "SIGINT": _signal("SIGINT"),
    "full disk": _fill_disk,
    "read-only folder": _make_read_only,
    "error": _raise(RuntimeError("a fault of the test")),
    "out of memory": _raise(torch.OutOfMemoryError("a fault of the test")),
}


class Fault(Callback):
    """Calls ``deed`` on one rank, in the named hook, at its ``count``-th call from 0."""

    def __init__(self, deed: str, rank: int, hook: str, count: int) -> None:
        self.deed, self.rank, self.left = DEEDS[deed], rank, count
        if deed == "read-only folder":
            _own_mounts()  # before the thread that writes checkpoints starts
        setattr(self, hook, self._count)

    def _count(self, trainer: Any, *_: Any, **__: Any) -> None:
        if trainer.global_rank == self.rank:
            self.left -= 1
            if self.left == -1:
                self.deed()


class NaNLoss(Callback):
    """Makes the loss of a rank's micro-batch NaN, counted from 0 over the run."""

    def __init__(self, rank: int, micro_batch: int) -> None:
        self.rank, self.micro_batch = rank, micro_batch

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        compute, own = pl_module.training_step, trainer.global_rank == self.rank

        def training_step(*args: Any) -> Any:
            bad = own and trainer.fit_loop.total_batch_idx == self.micro_batch
            return compute(*args) * (torch.nan if bad else 1.0)

        pl_module.training_step = training_step


class InfiniteGradient(Callback):
    """Makes a parameter's gradient infinite in a rank's micro-batch, counted from 0 over the run."""

    def __init__(self, rank: int, micro_batch: int, parameter: str) -> None:
        self.rank, self.micro_batch, self.parameter = rank, micro_batch, parameter

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        def overflow(grad: torch.Tensor) -> torch.Tensor:
            return grad * (torch.inf if trainer.fit_loop.total_batch_idx == self.micro_batch else 1.0)

        if trainer.global_rank == self.rank:
            pl_module.net.get_parameter(self.parameter).register_hook(overflow)


def _row_digest(inputs: Any, targets: Any) -> str:
    """Digest of a row up to its last target, independent of padding."""
    end = sum((targets >= 0).nonzero()[-1:].flatten().tolist()) + 1
    return hashlib.sha256(inputs[:end].numpy().tobytes() + targets[:end].numpy().tobytes()).hexdigest()


class Diary(Callback):
    """Writes a line per micro-batch to a file per rank: step, position in the step over all ranks, rows, loss."""

    def __init__(self, directory: str) -> None:
        self.directory = Path(directory)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.file = (self.directory / f"diary_{trainer.world_size}_{trainer.global_rank}.txt").open("a", buffering=1)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self.step = trainer.global_step
        rows = zip(batch["inputs"], batch["targets"], strict=True)
        self.content = ",".join(_row_digest(*row) for row in rows) or "empty"

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        number = trainer.fit_loop.total_batch_idx % trainer.accumulate_grad_batches
        place = number * trainer.world_size + trainer.global_rank
        loss = outputs["loss"].item() * trainer.accumulate_grad_batches
        self.file.write(f"{self.step} {place} {self.content} {loss.hex()}\n")
