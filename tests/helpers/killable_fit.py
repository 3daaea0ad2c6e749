"""Runs of `lmchat fit` that start quickly and can be killed, in forked processes."""

from __future__ import annotations

import os
import signal
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback

from forked import start_ranks
from lmchat.__main__ import main
from lmchat.callbacks import checkpoint


class LossRecorder(Callback):
    """Appends ``step micro-batch loss`` of every micro-batch to a file per rank, the loss in full precision.

    Each record is one unbuffered write, so a killed process loses none.
    """

    def __init__(self, directory: str) -> None:
        self.directory = Path(directory)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._file = (self.directory / f"losses_rank{trainer.global_rank}.txt").open("ab", buffering=0)

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        self._step = trainer.global_step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, *_: Any) -> None:
        micro_batch = trainer.fit_loop.total_batch_idx % trainer.accumulate_grad_batches
        self._file.write(f"{self._step} {micro_batch} {outputs['loss'].item().hex()}\n".encode())


class KillAfterCheckpoint(Callback):
    """Kills the process in ``hook`` after ``step``, whose checkpoint is complete by then."""

    def __init__(self, step: int, hook: str = "on_train_batch_start") -> None:
        self.step = step
        setattr(self, hook, self._kill)

    def _kill(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.strategy.checkpoint_io.writer.wait()
            os.kill(os.getpid(), signal.SIGKILL)


def _fit(args: list[str]) -> int:
    """One rank: `lmchat fit ARGS`."""
    checkpoint.INTERRUPTED_PEER_TIMEOUT_SECONDS = 3.0  # rank 0 waits this long if rank 1 is killed in a save
    return main(["fit", *args])


def start_fit(args: list[str], base: Path, world_size: int) -> list[BaseProcess]:
    """Starts the ranks of a run with torchrun's environment variables; their output is in ``base``."""
    return start_ranks(world_size, _fit, args, folder=base, environment={"LMCHAT_BASE_DIR": str(base)})


def alive(sessions: set[int]) -> list[int]:
    """Processes, other than zombies, that belong to one of the sessions."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, session, *_ = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(session) in sessions and state not in "ZX":
            found.append(int(stat.parent.name))
    return found
