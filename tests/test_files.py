"""Files and folders are written atomically, and a lock is held by one process."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from lmchat.files import locked, new_folder, replacing, synced_file
from lmchat.types import UserError


def fill(path: Path, target: Any) -> None:
    """Writes to the temporary path that a helper yields, and asserts that ``path`` does not exist yet."""
    if hasattr(target, "write"):
        target.write(b"new")
    elif target.is_dir():
        (target / "content").write_bytes(b"new")
    else:
        target.write_bytes(b"new")


def content(path: Path) -> bytes:
    return (path / "content" if path.is_dir() else path).read_bytes()


HELPERS = [synced_file, replacing, new_folder]


@pytest.mark.parametrize("helper", HELPERS)
def test_the_file_appears_at_the_end_of_the_block(
    helper: Callable[..., AbstractContextManager[Any]], tmp_path: Path
) -> None:
    path = tmp_path / "a.json"
    with helper(path) as target:
        fill(path, target)
        assert not path.exists()
    assert content(path) == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("helper", HELPERS)
def test_a_failed_block_leaves_no_file(helper: Callable[..., AbstractContextManager[Any]], tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(KeyboardInterrupt), helper(path) as target:
        fill(path, target)
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("helper", [synced_file, replacing])
def test_the_old_file_is_kept_until_the_end(helper: Callable[..., AbstractContextManager[Any]], tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), helper(path) as target:
        fill(path, target)
        raise RuntimeError
    assert content(path) == b"old"
    with helper(path) as target:
        fill(path, target)
        assert content(path) == b"old"
    assert content(path) == b"new"


@pytest.mark.parametrize("helper", [synced_file, new_folder])
def test_leftovers_of_a_killed_process_are_replaced(
    helper: Callable[..., AbstractContextManager[Any]], tmp_path: Path
) -> None:
    path = tmp_path / "a"

    def die() -> None:
        with helper(path) as target:
            fill(path, target)
            os._exit(9)

    process = multiprocessing.get_context("fork").Process(target=die)
    process.start()
    process.join()
    assert list(tmp_path.iterdir()) and not path.exists()
    with helper(path) as target:
        fill(path, target)
    assert list(tmp_path.iterdir()) == [path]


def test_non_empty_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    for name in ("full", "file"):
        with pytest.raises(UserError, match=f"{name} is not empty"), new_folder(tmp_path / name):
            pytest.fail("entered")
    with new_folder(tmp_path / "empty") as folder:
        (folder / "a").touch()
    assert (tmp_path / "empty" / "a").exists()


def test_a_failed_folder_leaves_none_above_it(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for output in (tmp_path / "$HOME" / "a" / "out", tmp_path / "there" / "new" / "out"):
        with pytest.raises(UserError, match="refused"), new_folder(output):
            assert output.parent.exists()
            raise UserError("refused")
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["there"]


def test_an_impossible_folder_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    output = tmp_path / "file" / "out"
    with pytest.raises(UserError, match=r"cannot write .*file/out.partial .*give the folder"), new_folder(output):
        pytest.fail("entered")


def test_a_second_process_waits_with_a_message(tmp_path: Path) -> None:
    script = (
        "import sys; from pathlib import Path; from lmchat.files import locked\n"
        "with locked(Path(sys.argv[1]), lambda: print('waits', flush=True)): print('in', flush=True)"
    )
    with locked(tmp_path / "lock", pytest.fail):
        other = subprocess.Popen(
            [sys.executable, "-c", script, str(tmp_path / "lock")], stdout=subprocess.PIPE, text=True
        )
        assert other.stdout is not None
        assert other.stdout.readline() == "waits\n"
        assert other.poll() is None
    assert other.communicate(timeout=60) == ("in\n", None)


def test_a_second_process_can_fail_instead_of_waiting(tmp_path: Path) -> None:
    def refuse() -> None:
        raise UserError("taken")

    path = tmp_path / "lock"
    with locked(path, pytest.fail), pytest.raises(UserError, match="taken"), locked(path, refuse):
        pytest.fail("entered")
