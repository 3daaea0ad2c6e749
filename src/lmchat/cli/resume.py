"""Resolves ``--ckpt_path``: a file, a folder, ``last`` or ``auto``."""

from __future__ import annotations

from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lmchat.checkpoint.layout import checkpoint_dir, committed_steps
from lmchat.checkpoint.load import Checkpoint, find_checkpoint
from lmchat.paths import expand_user
from lmchat.stage_table import STAGES
from lmchat.types import UserError


def find_start(path: str | None, stage: str, tag: str, dirpath: str | None) -> Checkpoint | None:
    """The checkpoint that a run starts from; None starts from initial weights.

    ``path`` is ``--ckpt_path``. ``last`` is the newest checkpoint of the run (its folder is ``dirpath``, by default
    that of stage and tag). ``auto`` is the same, else the newest one of the nearest earlier stage with the same tag,
    else None.

    Raises:
        UserError: the checkpoint does not exist or is damaged.
    """
    own = expand_user(dirpath) if dirpath else checkpoint_dir(stage, tag)
    if path == "auto":
        earlier = [checkpoint_dir(name, tag) for name in STAGES[stage].predecessors]
        found = next((folder for folder in [own, *earlier] if committed_steps(folder)), None)
        path = None if found is None else str(found)
    if path == "last" and not dirpath and not own.exists():
        raise UserError(
            f"there is no run named {tag} of stage {stage} ({own} is missing); train one first (lmchat fit), name "
            "another with --model.tag, or give the folder of its checkpoints with --ckpt_path"
        )
    return None if path is None else find_checkpoint(path, directory=own, warn=rank_zero_warn)


def resumable(start: Checkpoint | None, stage: str) -> Checkpoint | None:
    """``start`` if the trainer can restore it; None if only its weights are used: of another stage, or imported."""
    return start if start is not None and start.stage == stage and not start.weights_only else None
