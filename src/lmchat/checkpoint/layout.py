"""Folders and names of a checkpoint's files.

    <base>/base_checkpoints/<tag>/model_005000.pt         weights: a state dict of the GPT
                                  optim_005000_rank0.pt   that rank's optimizer, random numbers, data position
                                  meta_005000.json        written last: what the checkpoint is and consists of

A checkpoint exists once its ``meta`` file exists. ``meta`` lists all other files with size and SHA-256.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from lmchat.files import TEMPORARY_SUFFIX
from lmchat.paths import base_dir, check_folder_name
from lmchat.stage_table import STAGES, current_stage_name
from lmchat.types import UserError

LOCK_NAME = ".lock"

# A receipt has the sizes and checksums of a rank's files; rank 0 copies them into meta and deletes the receipt.
_FILE_NAME = re.compile(
    r"(?:model|meta|optim|receipt)_([0-9]{6,})(?:_rank[0-9]+)?(?:_[0-9a-f]+)?\.(?:pt|json)"
    rf"(?:(?:\.[0-9a-f]+)?{re.escape(TEMPORARY_SUFFIX)})?"
)
_CHECKPOINT_NAME = re.compile(r"(?:model_([0-9]{6,})\.pt|meta_([0-9]{6,})\.json)")


def checkpoint_dir(stage: str, tag: str) -> Path:
    """The folder of the checkpoints of the run ``tag``. The stage may have its former name.

    Raises:
        UserError: the tag is not a valid folder name.
    """
    check_folder_name("the tag", tag)
    return base_dir() / STAGES[current_stage_name(stage)].checkpoints / tag


@dataclass(frozen=True)
class CheckpointPaths:
    """The files of the checkpoint of one optimizer step."""

    directory: Path
    step: int

    @classmethod
    def of(cls, path: str | Path) -> CheckpointPaths:
        """Parses the path of a ``model_*.pt`` or ``meta_*.json`` file, which need not exist.

        Raises:
            UserError: the file name is neither.
        """
        path = Path(path)
        match = _CHECKPOINT_NAME.fullmatch(path.name)
        if match is None:
            raise UserError(
                f"{path} is not an lmchat checkpoint; give its folder, a model_005000.pt, a meta_005000.json, or last"
            )
        return cls(path.parent, int(match[1] or match[2]))

    @property
    def model(self) -> Path:
        return self.directory / f"model_{self.step:06d}.pt"

    @property
    def meta(self) -> Path:
        return self.directory / f"meta_{self.step:06d}.json"

    def optimizer(self, rank: int) -> Path:
        return self.directory / f"optim_{self.step:06d}_rank{rank}.pt"

    def receipt(self, rank: int, attempt: str = "") -> Path:
        """Sizes and checksums of the files of ``rank``, for rank 0 of the same attempt."""
        suffix = f"_{attempt}" if attempt else ""
        return self.directory / f"receipt_{self.step:06d}_rank{rank}{suffix}.json"


def files_by_step(directory: Path) -> dict[int, list[Path]]:
    """All files of checkpoints in ``directory``, including unfinished ones, by optimizer step."""
    files: dict[int, list[Path]] = {}
    for path in directory.iterdir() if directory.is_dir() else ():
        if match := _FILE_NAME.fullmatch(path.name):
            files.setdefault(int(match[1]), []).append(path)
    return files


def committed_steps(directory: Path) -> list[int]:
    """Steps whose ``meta`` exists, in ascending order."""
    return sorted(
        step for step, files in files_by_step(directory).items() if CheckpointPaths(directory, step).meta in files
    )
