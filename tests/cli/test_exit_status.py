"""After an error no process of a run is left."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from lightning.fabric.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher

from lmchat.cli import exit_status
from lmchat.cli.exit_status import ending_other_ranks
from lmchat.strategies.lightning_internals import keep_other_ranks_alive


@pytest.mark.parametrize("kept_alive", [False, True])
def test_ranks_that_wait_for_a_failed_one_are_ended(kept_alive: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exit_status, "PEER_SECONDS", 1)
    launcher = _SubprocessScriptLauncher(LightningEnvironment(), num_processes=3, num_nodes=1)
    trainer: Any = SimpleNamespace(strategy=SimpleNamespace(launcher=launcher))
    with pytest.raises(ValueError, match="the cause"), ending_other_ranks(trainer):
        for code in ("import time; time.sleep(60)", "raise SystemExit(3)"):
            launcher.procs.append(subprocess.Popen([sys.executable, "-S", "-c", code]))
        processes = list(launcher.procs)
        if kept_alive:
            keep_other_ranks_alive(launcher)
        raise ValueError("the cause")
    assert [process.wait(10) for process in processes] == [-9, 3]


def test_without_an_error_ranks_are_left_to_the_launcher() -> None:
    trainer: Any = SimpleNamespace()
    with ending_other_ranks(trainer):
        pass
