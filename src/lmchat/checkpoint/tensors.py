"""Checks names and shapes of a model's tensors against its config."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lmchat.model.config import GPTConfig
from lmchat.model.gpt import GPT
from lmchat.types import UserError


def shapes(config: GPTConfig) -> dict[str, torch.Size]:
    """Names and shapes of all tensors of a GPT with this config."""
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in GPT(config).state_dict().items()}


def shapes_of(state: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    """Names and shapes of all tensors of a state dict."""
    return {name: tensor.shape for name, tensor in state.items()}


def check_tensors(found: Mapping[str, torch.Size], expected: Mapping[str, torch.Size], where: str) -> None:
    """Raises UserError unless ``found`` and ``expected`` have the same names and shapes."""
    unknown, missing = sorted(found.keys() - expected.keys()), sorted(expected.keys() - found.keys())
    different = [name for name in sorted(found.keys() & expected.keys()) if found[name] != expected[name]]
    if unknown:
        raise UserError(f"{where} holds {_some(unknown)}, for which this architecture has no place")
    if missing:
        raise UserError(f"{where} lacks {_some(missing)}; it is incomplete or of another architecture")
    if different:
        name = different[0]
        raise UserError(
            f"{where} holds {name} of shape {tuple(found[name])}, and its config asks for {tuple(expected[name])}; "
            "they are not of one model"
        )


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
