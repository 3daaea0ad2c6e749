"""The examples of the documentation run as printed."""

from __future__ import annotations

import re
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest

from lmchat.__main__ import COMMANDS, TRAINER_COMMANDS, main

REPOSITORY = Path(__file__).resolve().parent.parent
DOCS = REPOSITORY / "docs"
PAGES = [*REPOSITORY.glob("*.md"), *sorted(DOCS.glob("[a-z]*.md"))]


def test_the_functions_page_runs_from_top_to_bottom() -> None:
    names: dict[str, Any] = {}
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "functions.md").read_text(), re.DOTALL)
    assert len(blocks) >= 6
    for block in blocks:
        exec(block, names)
    assert names["rows"] == [[(1, 9)], [(0, 5), (3, 4)]]
    assert names["logits"].shape == (2, 256, 512)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_python_name_exists(page: Path) -> None:
    for name in re.findall(r"`(lmchat(?:\.\w+)+)[`(]", page.read_text()):
        resolve_name(name)


def test_every_make_target_that_is_named_exists() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE))
    for page in PAGES:
        assert set(re.findall(r"`make ([a-z-]+)", page.read_text())) <= targets, page


def test_every_lmchat_command_that_is_named_exists() -> None:
    for page in (*PAGES, *(REPOSITORY / "configs").glob("*.yaml")):
        named = set(re.findall(r"(?:^\s*(?:# Run: )?|`)lmchat ([a-z]+)", page.read_text(), re.MULTILINE))
        assert named <= {*COMMANDS, *TRAINER_COMMANDS}, page


def test_the_readme_has_no_gaps() -> None:
    assert not re.search(r"TODO|TBD|XXX", (REPOSITORY / "README.md").read_text())


def test_every_path_exists() -> None:
    for page in PAGES:
        for path in re.findall(r"`((?:src|docs|configs|tests|benchmarks)/[\w./]+)`", page.read_text()):
            assert (REPOSITORY / path).exists(), path


def test_help_lists_every_command_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    import subprocess
    import sys

    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in (*COMMANDS, *TRAINER_COMMANDS))
    check = "import sys; from lmchat.__main__ import main; main(['--help']); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], capture_output=True).returncode == 0
    check = "import sys, lmchat; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0
