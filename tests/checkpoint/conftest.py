"""Fixtures: a small checkpoint, and folders that cannot be written."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from checkpoint_meta import META
from lmchat.checkpoint.layout import CheckpointPaths
from lmchat.checkpoint.writer import prune, write_checkpoint

Save = Callable[..., CheckpointPaths]


def save_step(directory: Path, step: int, keep_last: int | None = None, **options: Any) -> CheckpointPaths:
    """Saves a checkpoint in which every tensor is filled with the step."""
    paths = CheckpointPaths(directory, step)
    write_checkpoint(
        paths,
        model={"transformer.wte.weight": torch.full((64, 16), float(step))},
        rank_state={
            "optimizer_states": [{"exp_avg": torch.full((64, 16), float(step))}],
            "position": [step, None],
            "rng": {},
            "callbacks": {},
            "lr_schedulers": [],
        },
        meta=META,
        **options,
    )
    if keep_last is not None:
        prune(paths, keep_last)
    return paths


@pytest.fixture
def save() -> Save:
    return save_step


@pytest.fixture
def mount_tmpfs(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """Mounts a tmpfs with the given options; skips the test if that is not allowed."""
    mounted = []

    def mount(options: str) -> Path:
        folder = tmp_path / "mounted"
        folder.mkdir()
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode != 0:
            pytest.skip("mounting a file system is not allowed here")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", str(folder)], check=True)
