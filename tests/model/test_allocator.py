"""Large blocks are reused: counted in page faults of a fresh process."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lmchat.model.allocator import tune_malloc

PROGRAM = """
import resource, sys, torch
from lmchat.model.allocator import tune_malloc
if sys.argv[1] == "keep":
    assert tune_malloc()
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(12):  # Alignment leaves splinters between the first few blocks.
    torch.ones(2**24)
rounds = []
for _ in range(3):  # The fewest: a block that does not fit its place once is mapped anew.
    before = faults()
    for _ in range(10):
        torch.ones(2**24)
    rounds.append(faults() - before)
print(min(rounds))
"""


def faults(mode: str) -> int:
    out = subprocess.run([sys.executable, "-c", PROGRAM, mode], capture_output=True, text=True, check=True)
    return int(out.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a glibc setting")
def test_blocks_of_64_mb_come_back_without_page_faults() -> None:
    assert faults("keep") < 0.05 * faults("default")


def test_elsewhere_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert tune_malloc() is False
