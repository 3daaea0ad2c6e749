"""Writes imported models as regular checkpoints."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from lmchat.checkpoint.layout import CheckpointPaths, checkpoint_dir, files_by_step
from lmchat.checkpoint.meta_schema import check_settings
from lmchat.checkpoint.tensors import check_finite, check_tensors, empty_state
from lmchat.checkpoint.writer import write_checkpoint
from lmchat.files import json_object
from lmchat.model.config import GPTConfig
from lmchat.optim.param_groups import LEARNING_RATES
from lmchat.paths import tokenizer_dir
from lmchat.tokenizer.bpe import Tokenizer
from lmchat.types import UserError, user_errors


@dataclass(frozen=True)
class ImportedModel:
    """An imported model.

    Attributes:
        source: folder it was read from.
        kind: format it was read from: "hf" or "nanochat".
        state: state dict of the GPT, in any floating-point dtype.
        stage, tag, step: stage, name and optimizer steps of the run; None if unknown.
        settings: settings of the training run that later stages use.
        notes: remarks for the user.
    """

    source: Path
    kind: str
    config: GPTConfig
    state: Mapping[str, torch.Tensor]
    tokenizer: Tokenizer
    stage: str | None = None
    tag: str | None = None
    step: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_json(path: Path, missing: str) -> dict[str, Any]:
    """The JSON object in a file of a model to import; ``missing`` is the message where there is no such file."""
    if not path.exists():
        raise UserError(missing)
    with user_errors(f"{path} is damaged", "copy or download it again", ValueError):
        return json_object(path.read_bytes())


def save_imported(model: ImportedModel, *, stage: str, tag: str) -> CheckpointPaths:
    """Writes the model as a checkpoint of step 0 without optimizer state, and its tokenizer if there is none yet.

    Raises:
        UserError: tensors and config, or model and tokenizer, do not match; the run's folder exists; or the base folder
            has another tokenizer.
    """
    try:
        check_settings({**model.settings, "stage": stage, "tag": tag})
    except UserError as error:
        raise UserError(f"cannot import {model.source}: {error}; correct its files, or give another --tag") from error
    check_tensors(model.state, empty_state(model.config), str(model.source), "copy or download it again")
    check_finite(model.state, str(model.source))
    if model.tokenizer.vocab_size != model.config.vocab_size:
        raise UserError(
            f"the tokenizer of {model.source} has {model.tokenizer.vocab_size} tokens and its model "
            f"{model.config.vocab_size}; give the tokenizer that the model was trained with"
        )
    paths = CheckpointPaths(checkpoint_dir(stage, tag), 0)
    if files_by_step(paths.directory):
        raise UserError(f"{paths.directory} already contains a run; choose another name with --tag, or move it away")
    _save_tokenizer(model.tokenizer)
    paths.directory.mkdir(parents=True, exist_ok=True)
    write_checkpoint(
        paths,
        model={name: tensor.float() for name, tensor in model.state.items()},
        rank_state={},
        meta={
            "learning_rates": LEARNING_RATES,
            "global_batch_tokens": None,
            **model.settings,
            "stage": stage,
            "tag": tag,
            "model": asdict(model.config),
            "tokenizer_fingerprint": model.tokenizer.fingerprint,
            "weights_only": True,
            "imported": {"kind": model.kind, "from": str(model.source), "step": model.step},
        },
    )
    return paths


def _save_tokenizer(tokenizer: Tokenizer) -> None:
    folder = tokenizer_dir()
    if not (folder / "tokenizer.json").exists():
        tokenizer.save(folder)
    elif Tokenizer.load(folder).fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"{folder} contains a tokenizer that differs from the model's; set LMCHAT_BASE_DIR to a separate "
            "folder for this model"
        )
