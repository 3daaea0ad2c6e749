"""Two ranks under torchrun and Lightning's launcher: all exit with the right status and save their progress."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lmchat.checkpoint.layout import committed_steps

BIN = Path(sys.executable).parent
LAUNCHERS = {
    "Lightning": [BIN / "lmchat"],
    "torchrun": [BIN / "torchrun", "--standalone", "--nproc_per_node", "2", "-m", "lmchat"],
}
CONFIG = """
trainer: {accelerator: cpu, devices: 2, strategy: zero2_muon, max_steps: 1000000, callbacks: [%s]}
model:
  class_path: PretrainModule
  init_args: {depth: 2, sequence_len: 32, head_dim: 32, window_pattern: SL, global_batch_tokens: 256}
data:
  class_path: FineWebDataModule
  init_args: {micro_batch_size: 2, eval_tokens: 1024, buffer_size: 20}
eval: {every_n_steps: 0, at_start: false}
monitor: {every_n_steps: 1}
samples: {max_new_tokens: 0}
checkpoint: {every_n_steps: 3}
"""
ERROR = "{class_path: faults.Fault, init_args: {deed: error, rank: 1, hook: on_train_batch_start, count: 9}}"


def processes(base: Path, *variables: str) -> list[int]:
    """Processes of the run in ``base``, found by their environment, since torchrun starts new sessions."""
    wanted, found = {f"LMCHAT_BASE_DIR={base}".encode(), *map(str.encode, variables)}, []
    for environment in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if wanted <= set(environment.read_bytes().split(b"\0")):
                found.append(int(environment.parent.name))
    return found


def _kill_rank_1(launcher: int, base: Path) -> None:
    (rank,) = processes(base, "LOCAL_RANK=1")
    os.kill(rank, signal.SIGKILL)


Deed = Callable[[int, Path], None]
EVENTS: dict[str, tuple[Deed | None, int, str | None]] = {
    # action on the launcher, Lightning's exit status (torchrun's is 1), and message
    "SIGTERM": (lambda launcher, _: os.kill(launcher, signal.SIGTERM), 143, None),
    "Ctrl-C": (lambda launcher, _: os.killpg(launcher, signal.SIGINT), 130, None),
    "SIGKILL of a rank": (_kill_rank_1, 1, "lmchat: rank 0 lost the connection to another rank"),
    "error on a rank": (None, 1, "a fault of the test"),
}


def start(launcher: str, base: Path, *options: str, fault: str = "") -> subprocess.Popen[bytes]:
    """Starts a run in a new session, in which Ctrl-C works; its output folder is ``base``."""
    (base / "own.yaml").write_text(CONFIG % fault)
    path = f"{Path(__file__).parent / 'helpers'}:{os.environ.get('PYTHONPATH', '')}"
    with (base / "output.txt").open("wb") as output:
        return subprocess.Popen(
            [*LAUNCHERS[launcher], "fit", "--config", base / "own.yaml", *options],
            env={**os.environ, "LMCHAT_BASE_DIR": str(base), "PYTHONPATH": path},
            stdout=output,
            stderr=output,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_all_ranks_end_and_save_their_progress(launcher: str, event: str, base: Path) -> None:
    deed, status, message = EVENTS[event]
    checkpoints = base / "base_checkpoints" / "d2"
    run = start(launcher, base, fault="" if deed else ERROR)
    try:
        if deed:
            while not committed_steps(checkpoints):
                assert run.poll() is None, (base / "output.txt").read_text()
                time.sleep(0.05)
            deed(run.pid, base)
        status_seen = run.wait(500 if deed is None else 100)
        text = (base / "output.txt").read_text()
        assert status_seen == (status if launcher == "Lightning" else 1), text
        deadline = time.monotonic() + 60
        while (left := processes(base)) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not left, text
    finally:
        for pid in processes(base):
            os.kill(pid, signal.SIGKILL)
    assert message is None or message in text
    done = [int(step) for step in re.findall(r"^step (\d+)/", text, re.MULTILINE)]
    saved = committed_steps(checkpoints)[-1]
    if event == "SIGKILL of a rank":
        assert saved >= done[-1] - 6, text  # the interval, and a write in flight
    else:
        assert saved == done[-1], text
        assert f"meta_{saved:06d}.json" in text or event in ("SIGTERM", "Ctrl-C"), text


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_mistakes_are_reported_without_a_traceback(launcher: str, base: Path) -> None:
    run = start(launcher, base, "--model.global_batch_tokens", "100")
    assert run.wait(250) == (2 if launcher == "Lightning" else 1)
    text = (base / "output.txt").read_text()
    assert "lmchat: global_batch_tokens 100 is not a multiple" in text
    assert "lmchat/__main__.py" not in text, text  # torchrun prints its own traceback
