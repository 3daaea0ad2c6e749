"""Ctrl-C while the process ends."""

from __future__ import annotations

import subprocess
import sys

import pytest

CODE = """
import atexit, os, signal, sys
from lmchat import __main__ as entry

def interrupt(*_):
    signal.raise_signal(signal.SIGINT)

signal.signal(signal.SIGINT, signal.default_int_handler)
atexit.register(interrupt)
if sys.argv[1] == "interrupted":
    entry._run = interrupt
sys.argv = ["lmchat", "--version"]
sys.exit(entry.main())
"""


@pytest.mark.parametrize("start", ["interrupted", "finished"])
def test_ctrl_c_at_the_end_of_the_process_prints_nothing(start: str) -> None:
    run = subprocess.run([sys.executable, "-c", CODE, start], capture_output=True, text=True)
    assert (run.returncode, run.stderr) == (130, "")
    assert run.stdout.startswith("lmchat ") == (start == "finished")
