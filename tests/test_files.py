"""Files and folders appear whole or not at all, and a lock admits one process."""

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
    """Writes to what a helper for ``path`` yields, and sees that nothing is at ``path`` yet."""
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
def test_it_appears_when_the_block_ends(helper: Callable[..., AbstractContextManager[Any]], tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with helper(path) as target:
        fill(path, target)
        assert not path.exists()
    assert content(path) == b"new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("helper", HELPERS)
def test_nothing_is_left_of_a_block_that_fails(
    helper: Callable[..., AbstractContextManager[Any]], tmp_path: Path
) -> None:
    path = tmp_path / "a.json"
    with pytest.raises(KeyboardInterrupt), helper(path) as target:
        fill(path, target)
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("helper", [synced_file, replacing])
def test_a_file_that_is_there_stays_until_then(
    helper: Callable[..., AbstractContextManager[Any]], tmp_path: Path
) -> None:
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
def test_remains_of_a_killed_process_are_replaced(
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


def test_a_folder_that_holds_something_is_refused_and_an_empty_one_taken(tmp_path: Path) -> None:
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


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    output = tmp_path / "file" / "out"
    with pytest.raises(UserError, match=r"cannot write .*file/out.partial .*give the folder"), new_folder(output):
        pytest.fail("entered")


def test_a_second_process_is_told_and_waits(tmp_path: Path) -> None:
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


def test_a_second_process_can_refuse_to_wait(tmp_path: Path) -> None:
    def refuse() -> None:
        raise UserError("taken")

    path = tmp_path / "lock"
    with locked(path, pytest.fail), pytest.raises(UserError, match="taken"), locked(path, refuse):
        pytest.fail("entered")
