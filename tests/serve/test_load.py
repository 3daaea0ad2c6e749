"""A short run of the load benchmark."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_answers_are_complete_and_unmixed_under_load() -> None:
    script = Path(__file__).resolve().parents[2] / "benchmarks" / "serve_load.py"
    command = [sys.executable, str(script), "--seconds", "20", "--clients", "32"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "'right'" in done.stdout and "'left'" in done.stdout
