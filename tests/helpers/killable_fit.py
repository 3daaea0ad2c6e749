"""Runs of `lmchat fit` that start at once and can be killed: processes forked from one that has torch imported.

Imported by tests, and by the forked processes under the same name.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import signal
import socket
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

from lmchat.__main__ import main
from lmchat.callbacks import checkpoint

fork_server = multiprocessing.get_context("forkserver")
# Installed modules only: before Python 3.13 the server does not know where the tests are. The optimizer needs dynamo.
fork_server.set_forkserver_preload(["lmchat.cli.fit", "torch._dynamo"])
PR_SET_PDEATHSIG = 1


class LossRecorder(Callback):
    """Appends ``step micro-batch loss`` of every micro-batch to a file of the rank's, the loss in full precision.

    Each record is one write to an unbuffered file, so that a killed process leaves all of them behind.
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


def _fit(args: list[str], environment: dict[str, str], output: Path) -> None:
    """One rank: `lmchat fit ARGS` in a session of its own, which ends at the latest with the fork server."""
    os.setsid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell in the background starts its jobs deaf to it
    gc.freeze()
    torch.set_num_threads(1)
    checkpoint.INTERRUPTED_PEER_TIMEOUT_SECONDS = 3.0  # it is waited for whenever rank 1 is killed in a save
    sys.exit(main(["fit", *args]))


def start_fit(args: list[str], base: Path, world_size: int) -> list[BaseProcess]:
    """The ranks of a run, in the environment that torchrun gives them; what they print is in ``base``."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    ranks = []
    for rank in range(world_size):
        environment = {"LMCHAT_BASE_DIR": str(base)}
        if world_size > 1:
            environment |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "GROUP_RANK": "0",
                "WORLD_SIZE": str(world_size),
                "LOCAL_WORLD_SIZE": str(world_size),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "TORCHELASTIC_RUN_ID": "test",
            }
        process = fork_server.Process(target=_fit, args=(args, environment, base / f"output_rank{rank}.txt"))
        process.start()
        ranks.append(process)
    return ranks


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
