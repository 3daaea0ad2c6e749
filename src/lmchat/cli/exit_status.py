"""End of a training process: exit status after a signal, messages after a failed rank or out of memory."""

import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import lightning as L
from lightning.pytorch.utilities.exceptions import SIGTERMException

from lmchat.checkpoint.writer import INTERRUPTED_PEER_TIMEOUT_SECONDS
from lmchat.hardware import is_out_of_memory
from lmchat.stages.base import StageModule
from lmchat.stages.device_memory import out_of_memory
from lmchat.strategies.lightning_internals import other_ranks
from lmchat.types import RankFailure

PEER_SECONDS = INTERRUPTED_PEER_TIMEOUT_SECONDS + 10
"""Seconds that other ranks have to write their part of a checkpoint and exit, after an error on this one."""

_CONNECTION_LOST = re.compile(r"gloo/transport/\S+ ([\w ]+\w)|(ncclRemoteError)")
"""Messages of gloo and NCCL after another process has exited; a group matches the reason."""


@contextmanager
def exit_with_signal_status(trainer: L.Trainer) -> Iterator[None]:
    """Exits with status 128 + n when signal n ends the run. SIGUSR1, SLURM's early warning, acts as SIGTERM."""
    if threading.current_thread() is not threading.main_thread():  # the only thread that receives signals
        yield
        return
    before = signal.signal(signal.SIGUSR1, lambda *_: signal.raise_signal(signal.SIGTERM))
    try:
        yield
    except SIGTERMException:
        # Lightning's exception is a SystemExit with status 0, so a scheduler would count the run as finished.
        sys.exit(128 + (getattr(trainer.strategy, "agreed_signal", 0) or signal.SIGTERM))
    except SystemExit as status:
        # Lightning exits with status 1 after Ctrl-C, like after an error.
        sys.exit(128 + signal.SIGINT if isinstance(status.__context__, KeyboardInterrupt) else status.code)
    finally:
        signal.signal(signal.SIGUSR1, before)


@contextmanager
def ending_other_ranks(trainer: L.Trainer) -> Iterator[None]:
    """After an error, ends the ranks that this process has started, if they do not end by themselves in time.

    On GPUs they may wait for this rank in NCCL, for 30 minutes by default, and hold their memory.
    """
    try:
        yield
    except BaseException:
        deadline = time.monotonic() + PEER_SECONDS
        for process in other_ranks(trainer.strategy.launcher):
            try:
                process.wait(max(0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
        raise


@contextmanager
def translate_peer_failure(trainer: L.Trainer) -> Iterator[None]:
    """Turns the error of a collective whose peer has exited into a `RankFailure`, which is reported in one line."""
    try:
        yield
    except RuntimeError as error:
        cause = error.__cause__ if isinstance(error, RankFailure) else error
        if not (match := _CONNECTION_LOST.search(str(cause))):
            raise
        reason = match[1] or match[2]
        raise RankFailure(
            f"rank {trainer.global_rank} lost the connection to another rank ({reason}); that rank's output says why"
        ) from error


@contextmanager
def translate_out_of_memory(module: StageModule) -> Iterator[None]:
    """Turns an out-of-memory error into a UserError that names a size that fits."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        if isinstance(error, RankFailure) or not is_out_of_memory(error):
            raise
        raise out_of_memory(module, error) from error
