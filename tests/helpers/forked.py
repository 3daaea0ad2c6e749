"""Processes that start quickly, forked from a server that has imported torch and Lightning.

A test process has one such server. The functions that its children run are in modules of this folder, which the
children import under the same name.
"""

from __future__ import annotations

import ctypes
import gc
import itertools
import multiprocessing
import os
import signal
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from multiprocessing.forkserver import ensure_running
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

fork_server = multiprocessing.get_context("forkserver")
fork_server.set_forkserver_preload(["fork_server_imports"])
PR_SET_PDEATHSIG = 1
_PORTS = itertools.count(97 * os.getpid())


def start(
    function: Callable[..., Any], *args: Any, output: Path, environment: Mapping[str, str] | None = None
) -> BaseProcess:
    """Calls ``function(*args)`` in a process with its own session, which ends at the latest with the fork server.

    Args:
        function: the exit status is what it returns, 0 for None.
        args: passed on to the function.
        output: file that stdout and stderr are appended to.
        environment: variables set in addition to those of the test.
    """
    _ensure_server()
    variables = {**os.environ, **(environment or {})}
    process = fork_server.Process(target=_run, args=(function, args, variables, output))
    process.start()
    return process


def _ensure_server() -> None:
    """Starts the server. Before Python 3.13 it finds modules by PYTHONPATH, not by the parent's path."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        ensure_running()


def _run(function: Callable[..., Any], args: Sequence[Any], variables: dict[str, str], output: Path) -> None:
    os.setsid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(file, 1)
    os.dup2(file, 2)
    os.environ.clear()
    os.environ.update(variables)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored by background jobs of a shell
    gc.freeze()
    sys.exit(function(*args))


def free_port() -> int:
    """A free port, outside the range of outgoing connections. Parallel test processes search different ranges."""
    while True:
        port = 20_000 + next(_PORTS) % 12_000
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


def start_ranks(
    world_size: int,
    function: Callable[..., Any],
    *args: Any,
    folder: Path,
    environment: Mapping[str, str] | None = None,
) -> list[BaseProcess]:
    """`start` for every rank, with torchrun's variables where there are several; output is in ``folder``."""
    port = free_port()
    ranks = []
    for rank in range(world_size):
        torchrun = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "GROUP_RANK": "0",
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "TORCHELASTIC_RUN_ID": "test",
        }
        variables = {**(environment or {}), **(torchrun if world_size > 1 else {})}
        ranks.append(start(function, *args, output=folder / f"output_rank{rank}.txt", environment=variables))
    return ranks


def exit_statuses(processes: Sequence[BaseProcess], seconds: float = 250) -> list[int | None]:
    """Waits for the processes; those that do not end in time are killed."""
    for process in processes:
        process.join(seconds)
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def lmchat(*args: str) -> int:
    """``lmchat ARGS``, as a function to `start`."""
    from lmchat.__main__ import main

    sys.argv = ["lmchat", *args]
    return main([*args])


def python(code: str) -> None:
    """``python -c CODE``, as a function to `start`."""
    exec(code, {"__name__": "__main__"})
