"""After any interrupted write, the previous checkpoint is intact and the new one is complete or absent."""

from __future__ import annotations

import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import resource
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lmchat.checkpoint import writer
from lmchat.checkpoint.layout import CheckpointPaths, committed_steps
from lmchat.checkpoint.load import load_model_state, load_rank_state, open_checkpoint
from lmchat.checkpoint.writer import BackgroundWriter, run_lock, snapshot, write_file
from lmchat.types import UserError

# A fork starts quickly, with torch imported.
processes = multiprocessing.get_context("fork")


def run(target: Callable[[], None]) -> int | None:
    """Exit code of ``target`` in a separate process."""
    process = processes.Process(target=target, daemon=True)
    process.start()
    process.join(60)
    return process.exitcode


def assert_whole(directory: Path) -> int:
    """Asserts that the newest checkpoint is complete and has the data of its step; returns the step."""
    checkpoint = open_checkpoint(CheckpointPaths(directory, committed_steps(directory)[-1]))
    value = torch.full((64, 16), float(checkpoint.step))
    assert torch.equal(load_model_state(checkpoint)["transformer.wte.weight"], value)
    state = load_rank_state(checkpoint, 0)
    assert torch.equal(state["optimizer_states"][0]["exp_avg"], value)
    assert state["position"] == [checkpoint.step, None]
    return checkpoint.step


def test_meta_lists_the_files_on_disk(tmp_path: Path, save) -> None:
    paths = save(tmp_path, 7)
    meta = json.loads(paths.meta.read_text())
    assert meta["stage"] == "pretrain" and meta["step"] == 7 and meta["world_size"] == 1
    assert meta["files"] == {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in (paths.model, paths.optimizer(0))
    }
    assert assert_whole(tmp_path) == 7


def dies_after(operations: int, directory: Path, save) -> Callable[[], None]:
    """Saves step 2 and prunes step 1 in a process that dies before its n-th change to the disk."""

    def target() -> None:
        left = operations

        def counted(function):
            def wrapper(*args, **kwargs):
                nonlocal left
                if left == 0:
                    os._exit(9)
                left -= 1
                return function(*args, **kwargs)

            return wrapper

        os.fsync = counted(os.fsync)
        Path.open, Path.replace, Path.unlink = counted(Path.open), counted(Path.replace), counted(Path.unlink)
        save(directory, 2, keep_last=1)

    return target


def test_a_crash_between_any_two_operations_leaves_a_complete_checkpoint(tmp_path: Path, save) -> None:
    survivors = []
    for operations in range(1000):
        directory = tmp_path / str(operations)
        directory.mkdir()
        save(directory, 1)
        exit_code = run(dies_after(operations, directory, save))
        survivors.append(assert_whole(directory))
        with run_lock(directory):
            pass
        committed = committed_steps(directory)
        assert len(list(directory.iterdir())) == 3 * len(committed) + 2, "remains were not removed"
        if exit_code == 0:
            break
    else:
        pytest.fail("the write never ended")
    assert operations > 12
    # The old checkpoint until the new one's meta is renamed, the new one from then on.
    assert survivors == sorted(survivors)
    assert set(survivors) == {1, 2}


def test_overwriting_a_step_makes_it_incomplete_until_the_end(
    tmp_path: Path, save, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)
    save(tmp_path, 2)

    def full_disk(*_: object) -> None:
        assert committed_steps(tmp_path) == [1]
        raise UserError("the disk is full")

    monkeypatch.setattr(writer, "_save_tensors", full_disk)
    with pytest.raises(UserError, match="disk is full"):
        save(tmp_path, 2)
    assert assert_whole(tmp_path) == 1


def test_killed_at_random_moments(tmp_path: Path, save) -> None:
    """SIGKILL while checkpoints are written: no complete checkpoint is lost."""
    generator = random.Random(0)
    step = 0
    for _ in range(12):
        receiver, sender = processes.Pipe(duplex=False)

        def write_on(first: int = step + 1, sender=sender) -> None:
            with run_lock(tmp_path):
                for step in range(first, first + 10_000):
                    save(tmp_path, step, keep_last=2)
                    sender.send(step)

        process = processes.Process(target=write_on)
        process.start()
        reported = [receiver.recv()]  # it is in progress
        time.sleep(generator.uniform(0, 0.03))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        sender.close()
        with contextlib.suppress(EOFError):
            while receiver.poll():
                reported.append(receiver.recv())
        step = assert_whole(tmp_path)
        assert step - reported[-1] in (0, 1)
        assert 1 <= len(committed_steps(tmp_path)) <= 3


@pytest.mark.parametrize("name", ["model_000002.pt", "optim_000002_rank0.pt", "meta_000002.json"])
def test_a_full_disk_keeps_older_checkpoints(name: str, tmp_path: Path, save, monkeypatch: pytest.MonkeyPatch) -> None:
    """The system call fails, since the file size limit is below the size of the file."""
    save(tmp_path, 1)
    size = (tmp_path / name.replace("2", "1")).stat().st_size
    write = writer.write_file

    def limited(path: Path, content, attempt=None):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if path.name == name:
            resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, limits[1]))
        try:
            return write(path, content, attempt)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(writer, "write_file", limited)
    with pytest.raises(UserError, match=rf"cannot write .*{name}: File too large; free some space.*meta_000001.json"):
        save(tmp_path, 2)
    assert assert_whole(tmp_path) == 1
    assert not list(tmp_path.glob("*.tmp"))


def test_a_really_full_disk(mount_tmpfs, save) -> None:
    folder = mount_tmpfs("size=40k")
    with pytest.raises(UserError, match="No space left on device; free some space"):
        for step in range(1, 10):
            save(folder, step)
    assert assert_whole(folder) == step - 1


def test_a_read_only_folder_is_refused_before_training(mount_tmpfs) -> None:
    folder = mount_tmpfs("ro")
    with pytest.raises(UserError, match=r"cannot write .*: Read-only file system; make the folder writable"):
        run_lock(folder / "d4").__enter__()
    with pytest.raises(UserError, match="Read-only"):
        run_lock(folder).__enter__()


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser may write anywhere")
def test_a_folder_without_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(UserError, match="Permission denied; make the folder writable"):
        run_lock(tmp_path).__enter__()


def test_a_second_run_is_refused_while_the_first_runs(tmp_path: Path) -> None:
    receiver, sender = processes.Pipe(duplex=False)

    def hold() -> None:
        with run_lock(tmp_path / "d4"):
            sender.send(True)
            time.sleep(60)

    process = processes.Process(target=hold)
    process.start()
    receiver.recv()
    with pytest.raises(UserError, match=rf"d4 is in use by another run \(process {process.pid} on "):
        run_lock(tmp_path / "d4").__enter__()
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    with run_lock(tmp_path / "d4"):
        pass


def test_a_released_lock_is_free(tmp_path: Path) -> None:
    with run_lock(tmp_path):
        pass
    assert run(run_lock(tmp_path).__enter__) == 0


def test_leftovers_of_interrupted_writes_are_removed(tmp_path: Path, save) -> None:
    paths = save(tmp_path, 1)
    remains = ["model_000002.pt", "optim_000002_rank1.pt.tmp", "receipt_000001_rank1.json", "meta_000001.json.tmp"]
    for name in remains:
        (tmp_path / name).touch()
    (tmp_path / "notes.txt").touch()
    with run_lock(tmp_path):
        pass
    assert {path.name for path in tmp_path.iterdir()} == {
        *(path.name for path in (paths.meta, paths.model, paths.optimizer(0))),
        "notes.txt",
        ".lock",
        ".attempt",
    }


def test_pruning_counts_back_from_the_new_checkpoint(tmp_path: Path, save) -> None:
    for step in (1, 2, 3, 9):
        save(tmp_path, step)
    save(tmp_path, 4, keep_last=2)
    assert committed_steps(tmp_path) == [3, 4, 9]
    assert not list(tmp_path.glob("*_000001*"))


def test_every_rank_writes_its_own_and_rank_0_completes(tmp_path: Path, save) -> None:
    order = []

    def write(rank: int) -> None:
        time.sleep(0.05 * rank)
        save(tmp_path, 1, rank=rank, world_size=3)
        order.append(rank)

    threads = [threading.Thread(target=write, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert order[-1] == 0
    checkpoint = open_checkpoint(CheckpointPaths(tmp_path, 1))
    assert checkpoint.meta["world_size"] == 3
    assert sorted(checkpoint.meta["files"]) == [
        "model_000001.pt",
        *(f"optim_000001_rank{rank}.pt" for rank in range(3)),
    ]
    assert not list(tmp_path.glob("receipt_*"))


def test_a_rank_that_never_writes_is_reported(tmp_path: Path, save) -> None:
    save(tmp_path, 1)
    with pytest.raises(UserError, match=r"receipt_000002_rank1.json did not appear"):
        save(tmp_path, 2, world_size=2, peer_timeout_seconds=lambda: 0.1)
    assert assert_whole(tmp_path) == 1


def test_a_snapshot_is_a_copy() -> None:
    tensor = torch.zeros(3, requires_grad=True)
    tree = {"state": [{"a": tensor}, (1, "x", None, 2.5, True, b"y")], 3: tensor[1:]}
    copy = snapshot(tree)
    tensor.data += 1
    assert copy["state"][1] == tree["state"][1]
    assert torch.equal(copy["state"][0]["a"], torch.zeros(3))
    assert not copy["state"][0]["a"].requires_grad
    # A view is saved without its base tensor.
    assert copy[3].untyped_storage().nbytes() == 8


def test_a_snapshot_refuses_objects_that_cannot_be_loaded_safely(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"checkpoint\['callbacks'\]\['Mine'\]\[1\] is a PosixPath"):
        snapshot({"callbacks": {"Mine": [1, tmp_path]}})


def test_errors_other_than_the_disk_are_not_hidden(tmp_path: Path) -> None:
    def fail(file) -> None:
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        write_file(tmp_path / "file", fail)
    assert not list(tmp_path.iterdir())


class TestBackgroundWriter:
    def test_training_continues_during_a_write(self) -> None:
        background, release = BackgroundWriter(), threading.Event()
        background.start(lambda: None if release.wait(10) else pytest.fail("blocked"))
        background.check()
        release.set()
        background.wait()

    def test_one_job_at_a_time(self) -> None:
        background, running, most = BackgroundWriter(), [], []

        def job() -> None:
            running.append(1)
            time.sleep(0.01)
            most.append(len(running))
            running.pop()

        for _ in range(5):
            background.start(job)
        background.wait()
        assert most == [1] * 5

    @pytest.mark.parametrize("surface", ["check", "wait"])
    def test_an_error_is_raised_once(self, surface: str) -> None:
        background = BackgroundWriter()

        def fail() -> None:
            raise UserError("no space left")

        background.start(fail)
        while not background._jobs[0].done():
            time.sleep(0.001)
        with pytest.raises(UserError, match="no space left"):
            getattr(background, surface)()
        background.wait()

    def test_an_error_is_kept_while_a_later_job_runs(self) -> None:
        background, release = BackgroundWriter(), threading.Event()

        def fail() -> None:
            raise UserError("no space left")

        background.start(fail)
        background.start(lambda: None if release.wait(10) else pytest.fail("blocked"))
        background.check()
        release.set()
        with pytest.raises(UserError, match="no space left"):
            background.wait()

    def test_the_interpreter_waits_for_it(self, tmp_path: Path) -> None:
        """A forked process ends as the interpreter does, with `threading._shutdown`."""

        def leave_while_writing() -> None:
            BackgroundWriter().start(lambda: (time.sleep(0.3), (tmp_path / "done").touch()))
            raise SystemExit(3)

        assert run(leave_while_writing) == 3
        assert (tmp_path / "done").exists()
