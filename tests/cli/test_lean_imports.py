"""Ctrl-C while modules are imported."""

from __future__ import annotations

import subprocess
import sys

CODE = """
import signal, sys, weakref
from lmchat.cli.lean_imports import importing

class Module: pass

signal.signal(signal.SIGINT, signal.default_int_handler)
module = Module()
reference = weakref.ref(module, lambda _: signal.raise_signal(signal.SIGINT))
{}
    del module
print("went on")
"""


def test_an_interrupt_in_a_callback_of_importlib_is_not_lost() -> None:
    """Python prints and drops a KeyboardInterrupt there, as the first run shows."""
    for context, expected in (("if True:", (0, "went on\n")), ("with importing():", (130, ""))):
        run = subprocess.run([sys.executable, "-c", CODE.format(context)], capture_output=True, text=True)
        assert (run.returncode, run.stdout) == expected
        assert ("Exception ignored in" in run.stderr) == (expected[0] == 0)


def test_an_interrupt_after_the_imports_can_be_handled() -> None:
    code = (
        CODE.format("with importing():").replace("    del module", "    pass").replace("print(", "del module; print(")
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.stdout == "went on\n" and "KeyboardInterrupt" in run.stderr
