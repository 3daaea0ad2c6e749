"""Commands in pipes that close early, with closed streams, and in terminals without Unicode."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lmchat.cli.standard_streams import is_broken_output
from lmchat.tokenizer.bpe import Tokenizer

LMCHAT = f"{sys.executable} -m lmchat"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("base")
    Tokenizer({bytes([byte]): byte for byte in range(256)}).save(base / "tokenizer")
    return base


def shell(base: Path, command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a bash command that calls ``lmchat``; returns lmchat's exit status."""
    script = f"set -o pipefail; {command.replace('lmchat', LMCHAT, 1)}"
    return subprocess.run(
        ["bash", "-c", script],
        env={**os.environ, "LMCHAT_BASE_DIR": str(base), **environment},
        capture_output=True,
        text=True,
        timeout=250,
    )


def test_a_closed_pipe_ends_the_command_silently(base: Path) -> None:
    (base / "long.txt").write_text("word " * 100_000)
    done = shell(base, "lmchat tokenizer show - < $LMCHAT_BASE_DIR/long.txt | head -1")
    assert (done.returncode, done.stderr) == (141, "")
    assert len(done.stdout.splitlines()) == 1


@pytest.mark.parametrize("command", ["--help", "data import --help", "tokenizer show hi", "fit --help"])
def test_a_pipe_without_a_reader_ends_the_command_silently(base: Path, command: str) -> None:
    done = shell(base, f"lmchat {command} | exec true")
    assert (done.returncode, done.stderr) in [(141, ""), (0, "")]  # 0 if ``true`` has not exited yet


def test_a_closed_standard_input_is_empty(base: Path) -> None:
    done = shell(base, "lmchat tokenizer show - <&-")
    assert (done.returncode, done.stderr) == (0, "")
    assert "0 tokens" in done.stdout


def test_closed_output_is_discarded(base: Path) -> None:
    (base / "0.txt").write_text("a b c d " * 100)
    command = "lmchat tokenizer train --data $LMCHAT_BASE_DIR/0.txt --vocab_size 266 --output $LMCHAT_BASE_DIR/new"
    done = shell(base, f"{command} >&- 2>&-")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert Tokenizer.load(base / "new").vocab_size == 266


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    "command", ["tokenizer show hi", "--help", "--version", "fit --help", "chat --help", "data --help"]
)
def test_a_full_disk_is_reported(base: Path, command: str, unbuffered: str) -> None:
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    done = shell(base, f"lmchat {command} > /dev/full", PYTHONUNBUFFERED=unbuffered)
    assert done.returncode == 2
    assert done.stderr == "lmchat: No space left on device; make room and run it again\n"


@pytest.mark.parametrize(
    "command",
    [
        "tokenizer train --data $LMCHAT_BASE_DIR/texts/a.txt --vocab_size 266",
        "data import $LMCHAT_BASE_DIR/texts",
    ],
)
def test_a_limit_on_the_size_of_files_is_reported(base: Path, command: str) -> None:
    """As a quota or a full disk; the file is named, and none is left behind."""
    (base / "texts").mkdir(exist_ok=True)
    for name in "ab":
        words = (f"{name}{number:05d}".translate(str.maketrans("0123456789", "abcdefghij")) for number in range(5000))
        (base / "texts" / f"{name}.txt").write_text(" ".join(words))
    before = {path for path in base.rglob("*") if path.is_file()}
    output = f"of_{command.split()[1]}"
    failed = shell(base, f"ulimit -f 2; lmchat {command} --output $LMCHAT_BASE_DIR/{output}")
    assert failed.returncode == 2
    assert str(base / output) in failed.stderr and "make room" in failed.stderr and failed.stderr.count("\n") == 1, (
        failed.stderr
    )
    assert {path for path in base.rglob("*") if path.is_file()} == before


def test_a_terminal_without_unicode_shows_escapes(base: Path) -> None:
    done = shell(base, "lmchat tokenizer show 'é 1'", PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(r"\xc3 195  \xa9 169  _ 32  1 49")


def test_invalid_input_is_replaced(base: Path) -> None:
    done = shell(base, r"printf 'a\xff' | lmchat tokenizer show -")
    assert done.returncode == 0, done.stderr
    assert "4 tokens" in done.stdout  # U+FFFD is three bytes


def test_only_broken_pipes_of_standard_streams_are_silent() -> None:
    assert not is_broken_output(BrokenPipeError())  # e.g. of a socket
    assert not is_broken_output(SystemExit(1))


def test_files_that_the_locale_cannot_read_are_reported(base: Path) -> None:
    (base / "own.yaml").write_text("# é\ntrainer: {max_steps: 1}\n", encoding="utf-8")
    done = shell(
        base,
        f"lmchat tokenizer train --config {base / 'own.yaml'}",
        LC_ALL="C",
        PYTHONUTF8="0",
        PYTHONCOERCECLOCALE="0",
        PYTHONIOENCODING="ascii",
    )
    assert done.returncode == 2
    (error,) = done.stderr.splitlines()
    assert error.startswith("lmchat: cannot read a file in ascii") and error.endswith("set PYTHONUTF8=1")


def test_a_disk_without_room_for_a_temporary_file_is_reported() -> None:
    """Libraries ask for a temporary folder when they are imported."""
    command = ["bash", "-c", "trap '' XFSZ; ulimit -f 0; exec \"$@\"", "-", sys.executable, "-m", "lmchat"]
    done = subprocess.run([*command, "chat", "-p", "hi"], capture_output=True, text=True)
    assert done.returncode == 2
    assert re.fullmatch(
        r"lmchat: No usable temporary directory found in .*; make room in one of them, or set TMPDIR to another "
        r"folder\n",
        done.stderr,
    )
