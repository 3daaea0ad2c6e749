"""Reads checkpoints of nanochat: ``model_005000.pt``, ``meta_005000.json`` and the pickled tokenizer.

Weight names are equal to lmchat's. Models without value embeddings or residual mix, as in older versions, are
supported; versions with additional tensors are not.
"""

import contextlib
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lmchat.checkpoint.imported import ImportedModel, read_json
from lmchat.checkpoint.layout import CheckpointPaths, files_by_step
from lmchat.checkpoint.load import read_tensors
from lmchat.checkpoint.meta_schema import check_model_shape
from lmchat.model.config import GPTConfig
from lmchat.optim.param_groups import LEARNING_RATES
from lmchat.tokenizer.bpe import SPECIAL_TOKENS, Tokenizer
from lmchat.types import UserError

_STAGES = {
    "base_checkpoints": "pretrain",
    "mid_checkpoints": "pretrain",
    "chatsft_checkpoints": "sft",
    "chatrl_checkpoints": "rl",
}


def read_nanochat(path: Path, tokenizer: Path | None = None) -> ImportedModel:
    """Reads a checkpoint of nanochat.

    Args:
        path: folder of the checkpoints, of which the last one is read, or a ``model_*.pt`` file.
        tokenizer: ``tokenizer.pkl`` or its folder; default is the checkpoint's folder, or nanochat's tokenizer folder.

    Raises:
        UserError: a file is missing, damaged or of another version.
    """
    paths = _find_paths(path)
    folder, meta = paths.directory, _read_meta(paths.meta)
    # Prefix of the names of a compiled model.
    state = {
        str(name).removeprefix("_orig_mod."): tensor
        for name, tensor in read_tensors(paths.model, mmap=True, remedy="copy it from where the model is").items()
    }
    return ImportedModel(
        source=paths.model,
        kind="nanochat",
        config=_config(meta["model_config"], state, paths.model),
        state=state,
        tokenizer=read_pickled_tokenizer(_find_tokenizer(folder, tokenizer)),
        stage=_STAGES.get(folder.absolute().parent.name),
        tag=folder.absolute().name,
        step=paths.step,
        settings=_settings(meta),
    )


def _find_paths(path: Path) -> CheckpointPaths:
    """The files of the checkpoint; their names are the same as lmchat's."""
    if path.is_file():
        with contextlib.suppress(UserError):  # another file
            if (paths := CheckpointPaths.of(path)).model.exists():
                return paths
    steps = [step for step in files_by_step(path) if CheckpointPaths(path, step).model.exists()]
    if not steps:
        raise UserError(
            f"there is no nanochat checkpoint in {path}; give the folder with model_005000.pt and "
            "meta_005000.json, e.g. base_checkpoints/d20"
        )
    return CheckpointPaths(path, max(steps))


def _read_meta(path: Path) -> dict[str, Any]:
    meta = read_json(path, missing=f"{path} is missing; copy it from where the model is")
    if "meta_sha256" in meta:
        raise UserError(f"{path} is an lmchat checkpoint; use its folder directly, without importing it")
    if not isinstance(meta.get("model_config"), dict):
        raise UserError(f"{path} has no model_config; give the folder of a nanochat checkpoint")
    return meta


def _config(shape: dict[str, Any], state: Mapping[str, torch.Tensor], path: Path) -> GPTConfig:
    fields = {
        "window_pattern": "L",  # before windows were introduced, every layer attended to the whole context
        **shape,
        "value_embeddings": any(name.startswith("value_embeds.") for name in state),
        "residual_mix": "resid_lambdas" in state,
    }
    try:
        check_model_shape(fields)
        return GPTConfig(**fields)
    except UserError as error:
        raise UserError(
            f"the model_config of {path}: {error}; give a model of nanochat's version of February 2026 or older"
        ) from error


def _settings(meta: dict[str, Any]) -> dict[str, Any]:
    """Settings in nanochat's meta that later stages use."""
    options = meta.get("user_config")
    options = options if isinstance(options, dict) else {}
    numbers = {name: value for name, value in options.items() if isinstance(value, int | float) and value > 0}
    given = {name: numbers[name] for name in LEARNING_RATES if name in numbers}
    settings: dict[str, Any] = {"learning_rates": {**LEARNING_RATES, **given}}
    batch, rows = options.get("total_batch_size"), meta.get("device_batch_size", options.get("device_batch_size"))
    if isinstance(batch, int) and batch > 0:
        settings["global_batch_tokens"] = batch
    if isinstance(rows, int) and rows > 0:
        settings["micro_batch_size"] = rows
    return settings


def _find_tokenizer(folder: Path, given: Path | None) -> Path:
    places = [folder, folder.absolute().parent.parent / "tokenizer"] if given is None else [given]
    for place in places:
        path = place if place.is_file() else place / "tokenizer.pkl"
        if path.is_file():
            return path
    raise UserError(f"no tokenizer.pkl in {' or '.join(map(str, places))}; give nanochat's with --tokenizer")


# The tokenizer --------------------------------------------------------------------------------------------------------


class _PickledEncoding:
    """Replaces tiktoken's Encoding when unpickling: stores the pickled state and runs nothing."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _EncodingUnpickler(pickle.Unpickler):
    """Allows tiktoken's Encoding only, since pickles can run arbitrary code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("tiktoken.core", "Encoding"):
            return _PickledEncoding
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def read_pickled_tokenizer(path: Path) -> Tokenizer:
    """Reads nanochat's ``tokenizer.pkl``, a pickled tiktoken Encoding, without running code from it.

    Raises:
        UserError: the file is damaged or has other contents, or the encoding has other special tokens.
    """
    try:
        with path.open("rb") as file:
            encoding = _EncodingUnpickler(file).load()
        state = encoding.state
        pattern, ranks, special = state["pat_str"], state["mergeable_ranks"], state["special_tokens"]
        if not isinstance(pattern, str) or not all(isinstance(token, bytes) for token in ranks):
            raise TypeError("its ranks and pattern are of the wrong type")
        expected = {name: len(ranks) + index for index, name in enumerate(SPECIAL_TOKENS)}
        tokenizer = Tokenizer(ranks, pattern)
    except Exception as error:  # damaged or malicious files raise errors of many types
        raise UserError(
            f"{path} is not a nanochat tokenizer ({error}); give the model's tokenizer.pkl with --tokenizer (only "
            "a pickled tiktoken Encoding is read, since other pickles can run code)"
        ) from error
    if special != expected:
        raise UserError(
            f"{path} has the special tokens {special}, not {', '.join(SPECIAL_TOKENS)} after the ranks; give the "
            "tokenizer.pkl of a nanochat model with --tokenizer"
        )
    return tokenizer
