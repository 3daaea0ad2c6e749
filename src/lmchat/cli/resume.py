"""What ``--ckpt_path`` means: a file, a folder, ``last`` or ``auto``."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lmchat.checkpoint.layout import checkpoint_dir, committed_steps
from lmchat.checkpoint.load import Checkpoint, find_checkpoint
from lmchat.paths import expand_user
from lmchat.stage_table import STAGES


def find_start(path: str | None, stage: str, tag: str, dirpath: str | None) -> Checkpoint | None:
    """The checkpoint that a run starts from; None starts from initial weights.

    Args:
        path: ``--ckpt_path``. ``last`` is the run's newest checkpoint. ``auto`` is that too, else the newest one with
            the same tag of the nearest earlier stage, else None.
        stage: name of the run's stage.
        tag: name of the run.
        dirpath: folder of the run's checkpoints where it is not the default one.

    Raises:
        UserError: the checkpoint does not exist or is damaged.
    """
    own = expand_user(dirpath) if dirpath else checkpoint_dir(stage, tag)
    if path == "auto":
        earlier = [checkpoint_dir(name, tag) for name in STAGES[stage].predecessors]
        found = next((folder for folder in [own, *earlier] if committed_steps(folder)), None)
        path = None if found is None else str(found)
    return None if path is None else find_checkpoint(path, directory=own, warn=rank_zero_warn)


def resume_path(start: Checkpoint | None, stage: str) -> Path | None:
    """The file that the trainer restores: a checkpoint of the same stage, unless it was imported.

    From a checkpoint of another stage, and from an imported one, only weights are loaded.
    """
    resumable = start is not None and start.stage == stage and not start.weights_only
    return start.paths.meta if start is not None and resumable else None
