"""A rank of an earlier attempt that was delayed at any point does not change the folder of a later attempt."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lmchat.checkpoint import attempt as module
from lmchat.checkpoint.attempt import ATTEMPT_NAME, Attempt, Superseded, watch_attempt
from lmchat.checkpoint.layout import CheckpointPaths
from lmchat.checkpoint.load import open_checkpoint
from lmchat.checkpoint.writer import prune, run_lock, write_file
from lmchat.types import UserError


def run(target: Callable[[], object]) -> int | None:
    """Exit code of ``target`` in a separate process, since a process does not exclude itself from its locks."""
    process = multiprocessing.get_context("fork").Process(target=target)
    process.start()
    process.join(60)
    return process.exitcode


def begin(directory: Path) -> Attempt:
    """A new attempt whose lock was released, as after a kill."""
    with run_lock(directory) as attempt:
        return attempt


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def test_the_newest_attempt_writes(tmp_path: Path, save) -> None:
    first = begin(tmp_path)
    save(tmp_path, 1, attempt=first)
    second = begin(tmp_path)
    assert first.name != second.name
    save(tmp_path, 2, attempt=second)
    assert open_checkpoint(CheckpointPaths(tmp_path, 2)).step == 2
    first_files = contents(tmp_path)
    with pytest.raises(Superseded, match="another attempt of this run is now writing to"):
        save(tmp_path, 2, attempt=first)
    with pytest.raises(Superseded):
        save(tmp_path, 3, rank=1, world_size=2, attempt=first)
    assert contents(tmp_path) == first_files


def hold_up(at: str, monkeypatch: pytest.MonkeyPatch, meanwhile: Callable[[], None]) -> None:
    """Runs ``meanwhile`` once between writing and renaming a file whose name contains ``at``."""
    done = threading.Event()
    writing = Attempt.writing

    def held(self: Attempt):
        if not done.is_set() and any(at in path.name for path in self.directory.glob(f"*{self.name}.tmp")):
            done.set()
            meanwhile()
        return writing(self)

    monkeypatch.setattr(Attempt, "writing", held)


@pytest.mark.parametrize("at", ["optim_000002_rank1", "receipt_000002_rank1"])
def test_an_orphan_delayed_before_its_rename(at: str, tmp_path: Path, save, monkeypatch: pytest.MonkeyPatch) -> None:
    orphan = begin(tmp_path)
    after: dict[str, bytes] = {}

    def resume_and_save() -> None:
        successor = begin(tmp_path)
        save(tmp_path, 2, rank=1, world_size=2, attempt=successor)
        save(tmp_path, 2, rank=0, world_size=2, attempt=successor)
        after.update(contents(tmp_path))

    hold_up(at, monkeypatch, resume_and_save)
    with pytest.raises(Superseded):
        save(tmp_path, 2, rank=1, world_size=2, attempt=orphan)
    assert contents(tmp_path) == after
    assert open_checkpoint(CheckpointPaths(tmp_path, 2)).meta["world_size"] == 2


def test_rank_0_ignores_receipts_of_other_attempts(tmp_path: Path, save) -> None:
    orphan = begin(tmp_path)
    successor = begin(tmp_path)
    stale = CheckpointPaths(tmp_path, 2).receipt(1, orphan.name)
    stale.write_text("{}")
    with pytest.raises(UserError, match="did not appear"):
        save(tmp_path, 2, world_size=2, attempt=successor, peer_timeout_seconds=lambda: 0.05)
    begin(tmp_path)
    assert not stale.exists()


def test_an_orphan_writes_no_meta_and_prunes_nothing(tmp_path: Path, save) -> None:
    orphan = begin(tmp_path)
    for step in (1, 2, 3):
        save(tmp_path, step, attempt=orphan)
    begin(tmp_path)
    before = contents(tmp_path)
    with pytest.raises(Superseded):
        save(tmp_path, 3, attempt=orphan)
    with pytest.raises(Superseded):
        prune(CheckpointPaths(tmp_path, 3), 1, orphan)
    assert contents(tmp_path) == before


def test_no_attempt_starts_during_a_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is suspended during a rename is reported."""
    begin(tmp_path)
    monkeypatch.setattr(module, "TAKEOVER_TIMEOUT_SECONDS", 0.1)
    with (tmp_path / ATTEMPT_NAME).open("rb") as file:
        fcntl.lockf(file, fcntl.LOCK_SH)

        def other_process() -> None:
            with pytest.raises(UserError, match="suspended while writing"):
                Attempt.begin(tmp_path)

        assert run(other_process) == 0
    assert run(lambda: begin(tmp_path)) == 0


def test_a_removed_folder_ends_the_attempt(tmp_path: Path) -> None:
    attempt = begin(tmp_path)
    (tmp_path / ATTEMPT_NAME).unlink()
    with pytest.raises(Superseded, match="is missing"):
        write_file(tmp_path / "file", lambda file: file.write(b"x"), attempt)
    assert not (tmp_path / "file").exists()


def test_a_process_that_hangs_ends_when_a_later_attempt_begins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(module, "WATCH_SECONDS", 0.02)
    monkeypatch.setattr(module, "GRACE_SECONDS", 0.02)
    attempt = begin(tmp_path)

    def hang() -> None:
        watch_attempt(attempt)
        time.sleep(50)

    process = multiprocessing.get_context("fork").Process(target=hang)
    process.start()
    for seconds in (1, 2):  # the same attempt with another time, then no file: it is told by the next write
        os.utime(tmp_path / ATTEMPT_NAME, (seconds, seconds))
        process.join(0.3)
    (tmp_path / ATTEMPT_NAME).rename(tmp_path / "moved")
    process.join(0.3)
    assert process.exitcode is None
    begin(tmp_path)
    process.join(30)
    assert process.exitcode == 1
    assert "lmchat: another attempt of this run is now writing to" in capfd.readouterr().err


def test_a_stopped_watch_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WATCH_SECONDS", 0.02)
    monkeypatch.setattr(module, "GRACE_SECONDS", 600)
    attempt = begin(tmp_path)

    def end_in_time() -> None:
        watch = watch_attempt(attempt)
        [thread] = (each for each in threading.enumerate() if each.name == "attempt watch")
        assert run(lambda: begin(tmp_path)) == 0
        time.sleep(0.2)
        watch.set()
        thread.join(30)
        assert not thread.is_alive()

    assert run(end_in_time) == 0


def test_a_process_may_begin_several_attempts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "WATCH_SECONDS", 0.02)
    monkeypatch.setattr(module, "GRACE_SECONDS", 0.02)

    def begin_twice() -> None:
        for _ in range(2):
            watch_attempt(begin(tmp_path))
            time.sleep(0.3)

    assert run(begin_twice) == 0
