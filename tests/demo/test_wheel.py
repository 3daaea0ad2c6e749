"""A built wheel contains everything the demo needs: it runs without a clone of the repository."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAM = """
import sys
import lmchat
from lmchat.demo.run import CONFIGS, Demo, STAGES
from lmchat.demo.tasks import Arithmetic
from lmchat.tasks import Identity
from pathlib import Path

assert lmchat.__file__.startswith(sys.argv[1]), lmchat.__file__
run = Demo(Path("x"), None, 15)
assert set(run.recipe()) == {"text", "vocab_size", *(f"config of {stage}" for stage in STAGES)}
assert all(run.config(stage).is_relative_to(sys.argv[1]) for stage in STAGES)
print(Arithmetic("test")[0]["messages"][0]["content"], Identity("test")[0]["messages"][0]["content"])
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the working tree."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (source / name).symlink_to(REPOSITORY / name)
    # A copy, since a build writes to the tree, and another worker may build too.
    shutil.copytree(REPOSITORY / "src", source / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    command = "from setuptools import build_meta; import sys; print(build_meta.build_wheel(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", command, str(folder)], cwd=source, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return path


def test_the_wheel_contains_texts_configs_and_the_page(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    source = REPOSITORY / "src"
    expected = {str(path.relative_to(source)) for path in source.rglob("*.yaml")}
    assert len(expected) >= 5
    expected |= {str(path.relative_to(source)) for path in (source / "lmchat" / "serve" / "page").iterdir()}
    assert expected <= names
    assert {str(path.relative_to(source)) for path in source.rglob("*.py")} <= names


def test_the_installed_demo_needs_no_repository(wheel: Path, tmp_path: Path) -> None:
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(installed)
    environment = {**os.environ, "PYTHONPATH": str(installed)}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(installed)], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "?" in done.stdout
