"""Loads a checkpoint with its tokenizer into an engine, for chatting and serving."""

from __future__ import annotations

from pathlib import Path

import torch

from lmchat.checkpoint.load import Checkpoint, load_model, load_tokenizer
from lmchat.generation.engine import Engine


def load_engine(checkpoint: Checkpoint, tokenizer_folder: Path | None = None) -> Engine:
    """The checkpoint's model with its tokenizer, on the GPU if there is one.

    Args:
        checkpoint: the model to load.
        tokenizer_folder: default is the ``tokenizer`` folder beside the checkpoint folders, or else
            ``$LMCHAT_BASE_DIR/tokenizer``.

    Raises:
        UserError: the tokenizer is missing, or is not the one that the model was trained with.
    """
    tokenizer = load_tokenizer(checkpoint, tokenizer_folder)
    return Engine(load_model(checkpoint, "cuda" if torch.cuda.is_available() else "cpu"), tokenizer)
