"""Loads a checkpoint with its tokenizer into an engine, for chatting and serving."""

from __future__ import annotations

from pathlib import Path

import torch

from lmchat.checkpoint.load import Checkpoint, find_checkpoint, load_model
from lmchat.generation.engine import Engine
from lmchat.paths import base_dir, tokenizer_dir
from lmchat.stage_table import STAGES
from lmchat.tokenizer.bpe import Tokenizer
from lmchat.types import UserError


def find_model(path: Path | None = None) -> Checkpoint:
    """The checkpoint at ``path``, by default the newest of the last stage that has one.

    Raises:
        UserError: there is no checkpoint, or it is damaged.
    """
    if path is not None:
        return find_checkpoint(path)
    for stage in reversed(STAGES.values()):
        metas = base_dir().glob(f"{stage.checkpoints}/*/meta_*.json")
        if newest := max(metas, key=lambda meta: meta.stat().st_mtime, default=None):
            return find_checkpoint(newest.parent)
    raise UserError(f"there is no model in {base_dir()}; train one first with `lmchat fit`, or name one: --checkpoint")


def load_engine(checkpoint: Checkpoint, tokenizer_folder: Path | None = None) -> Engine:
    """The checkpoint's model with its tokenizer, on the GPU if there is one.

    Args:
        checkpoint: the model to load.
        tokenizer_folder: default is the ``tokenizer`` folder beside the checkpoint folders, or else
            ``$LMCHAT_BASE_DIR/tokenizer``.

    Raises:
        UserError: the tokenizer is missing, or is not the one that the model was trained with.
    """
    beside = checkpoint.paths.directory.parent.parent / "tokenizer"
    folder = tokenizer_folder or (beside if beside.is_dir() else tokenizer_dir())
    tokenizer = Tokenizer.load(folder)
    if tokenizer.fingerprint != checkpoint.meta["tokenizer_fingerprint"]:
        raise UserError(
            f"{checkpoint.paths.meta} was trained with another tokenizer than the one in {folder}; give the folder of "
            "its own with --tokenizer"
        )
    return Engine(load_model(checkpoint, "cuda" if torch.cuda.is_available() else "cpu"), tokenizer)
