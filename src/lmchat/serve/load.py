"""Loads a checkpoint with its tokenizer into an engine, for chatting and serving."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmchat.checkpoint.load import Checkpoint, load_inference_model, load_tokenizer
from lmchat.generation.engine import Engine
from lmchat.scaling import parameter_counts


@dataclass(frozen=True)
class ModelCard:
    """Description of a model: its id in the API, the time of the checkpoint (Unix), and details shown on the page."""

    name: str
    created: int
    details: dict[str, Any]


def load_engine(checkpoint: Checkpoint, tokenizer_folder: Path | None = None, *, max_rows: int = 128) -> Engine:
    """An engine for a checkpoint's model, on the GPU if there is one; for its tokenizer see `load_tokenizer`.

    Raises:
        UserError: the tokenizer is missing, or is not the model's.
    """
    tokenizer = load_tokenizer(checkpoint, tokenizer_folder)
    return Engine(load_inference_model(checkpoint), tokenizer, max_rows=max_rows)


def model_card(checkpoint: Checkpoint, engine: Engine) -> ModelCard:
    """Describes the model for a server."""
    tag, stage, step = checkpoint.meta["tag"], checkpoint.stage, checkpoint.step
    details = {"stage": stage, "tag": tag, "step": step, "parameters": parameter_counts(engine.config).total}
    created = int(checkpoint.paths.meta.stat().st_mtime)
    return ModelCard(f"{tag}-{stage}-{step}", created, details)
