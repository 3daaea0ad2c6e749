"""Exports a checkpoint as a folder that the transformers library loads."""

import shutil
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

import torch

from lmchat.checkpoint.hf import format as form
from lmchat.checkpoint.hf.model_card import model_card
from lmchat.checkpoint.hf.tokenizer import write_tokenizer
from lmchat.checkpoint.load import Checkpoint, load_network_state
from lmchat.files import write_json
from lmchat.model.config import GPTConfig
from lmchat.tokenizer.bpe import Tokenizer
from lmchat.types import UserError, user_errors

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_MODELING = "modeling_lmchat.py"
_OF_THE_FILES = ("files", "lightning", "format", "world_size")
"""Fields of ``meta`` that describe the checkpoint's files, and are not exported."""


@dataclass(frozen=True)
class Export:
    """Result of `write_export`: numbers of tensors, of their elements, and of elements of padding rows, kept apart."""

    tensors: int
    parameters: int
    padding: int


def need(package: str, purpose: str) -> Any:
    """Imports an optional package.

    Raises:
        UserError: it is not installed.
    """
    try:
        return import_module(package)
    except ImportError as error:
        name = package.split(".")[0]
        raise UserError(f"{purpose} needs {name} ({error}); install it with: pip install 'lmchat[hf]'") from error


def choose_native(config: GPTConfig, native: bool | None) -> bool:
    """Whether to export as `NanoChatForCausalLM`; ``native`` None is true if it supports the architecture.

    Raises:
        UserError: ``native`` is true and it does not.
    """
    if native and config.native_obstacles:
        lacking = ", ".join(config.native_obstacles)
        raise UserError(
            f"--native true asks for transformers' NanoChatForCausalLM, which cannot express {lacking}; leave --native "
            "out to export with a modelling file, or train the variant that it can express (configs/d12_native.yaml)"
        )
    return not config.native_obstacles if native is None else native


def write_export(
    checkpoint: Checkpoint, tokenizer: Tokenizer, folder: Path, *, native: bool, dtype: Literal["fp32", "bf16"] = "fp32"
) -> Export:
    """Writes weights, configs, tokenizer, chat template and model card into ``folder``.

    Args:
        tokenizer: the tokenizer that the model was trained with.
        native: export as `NanoChatForCausalLM` instead of with lmchat's modelling file.
        dtype: dtype of the stored weights. bf16 halves the file; the factors of the residual mix stay fp32.

    Raises:
        UserError: a tensor of the checkpoint has no place in the export, a file of weights cannot be written, or
            safetensors is missing.
    """
    save_file = need("safetensors.torch", "an export").save_file
    from safetensors import SafetensorError  # installed, see above

    config = GPTConfig(**checkpoint.meta["model"])
    state = load_network_state(checkpoint)
    tensors, padding = form.to_native(state, config) if native else (state, {})
    _write_configs(folder, config, tokenizer, native, dtype)
    for name, part in ((form.MODEL_FILE, tensors), (form.PADDING_FILE, padding)):
        if part:
            # Copied, since safetensors writes the whole storage of a tensor, even if the tensor is only a part of it.
            stored = {key: tensor.to(stored_dtype(key, dtype), copy=True).contiguous() for key, tensor in part.items()}
            with user_errors(f"cannot write {folder / name}", "make room, or choose another folder", SafetensorError):
                save_file(stored, folder / name, metadata={"format": "pt"})
            shutil.copymode(folder / "config.json", folder / name)  # safetensors lets only the owner read it
    write_tokenizer(tokenizer, folder, form.context_limit(config, native))
    meta = {key: value for key, value in checkpoint.meta.items() if key not in _OF_THE_FILES}
    meta["stage"] = checkpoint.stage
    write_json(folder / form.META_FILE, meta)
    (folder / "README.md").write_text(model_card(meta, config, native, dtype), encoding="utf-8")
    if not native:
        shutil.copyfile(Path(__file__).parent / "files" / _MODELING, folder / _MODELING)
    return Export(
        tensors=len(tensors),
        parameters=sum(tensor.numel() for tensor in tensors.values()),
        padding=sum(tensor.numel() for tensor in padding.values()),
    )


def stored_dtype(name: str, dtype: str) -> torch.dtype:
    """The dtype that a tensor is exported in."""
    return torch.float32 if name.endswith("_lambdas") else DTYPES[dtype]


def _write_configs(folder: Path, config: GPTConfig, tokenizer: Tokenizer, native: bool, dtype: str) -> None:
    ends = [tokenizer.special("assistant_end"), tokenizer.bos_id]
    # No pad_token_id in the model's config: transformers would leave that row of the embedding untrained.
    ids = {"bos_token_id": tokenizer.bos_id, "eos_token_id": ends, "pad_token_id": None}
    form_config = form.native_config(config) if native else form.lmchat_config(config)
    write_json(folder / "config.json", {**form_config, **ids, "dtype": str(DTYPES[dtype]).removeprefix("torch.")})
    write_json(folder / "generation_config.json", {**ids, "pad_token_id": tokenizer.bos_id})
