"""Large blocks are reused, measured by the page faults of a separate process."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from forked import exit_statuses, python, start
from lmchat.model.allocator import tune_malloc

PROGRAM = """
import resource, torch
from lmchat.model.allocator import tune_malloc
if "MODE" == "keep":
    assert tune_malloc()
SIZE = 9 * 2**20  # 36 MiB: glibc may reuse blocks of up to 32 MiB by itself
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(12):  # Alignment leaves splinters between the first few blocks.
    torch.ones(SIZE)
rounds = []
for _ in range(3):  # The fewest: a block that does not fit its place once is mapped anew.
    before = faults()
    for _ in range(4):
        torch.ones(SIZE)
    rounds.append(faults() - before)
print(min(rounds))
"""


def faults(mode: str, folder: Path) -> int:
    output = folder / f"{mode}.txt"
    assert exit_statuses([start(python, PROGRAM.replace("MODE", mode), output=output)]) == [0], output.read_text()
    return int(output.read_text())


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a glibc setting")
def test_large_blocks_are_reused_without_page_faults(tmp_path: Path) -> None:
    assert faults("keep", tmp_path) < 0.05 * faults("default", tmp_path)


def test_no_effect_without_glibc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    assert tune_malloc() is False
