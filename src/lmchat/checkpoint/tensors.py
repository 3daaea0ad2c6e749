"""Checks names, shapes and types of a model's tensors against its config."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lmchat.checkpoint.meta_schema import shown
from lmchat.model.config import GPTConfig
from lmchat.model.gpt import GPT
from lmchat.types import UserError


def shapes(config: GPTConfig) -> dict[str, torch.Size]:
    """Names and shapes of all tensors of a GPT with this config."""
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in GPT(config).state_dict().items()}


def check_tensors(state: Mapping[str, Tensor], expected: Mapping[str, torch.Size], where: str, remedy: str) -> None:
    """Raises UserError unless the tensors of a state dict are floating-point and have the expected names and shapes.

    The message begins with ``where`` and ends with ``remedy``.
    """
    unknown, missing = sorted(state.keys() - expected.keys()), sorted(expected.keys() - state.keys())
    if unknown:
        raise UserError(f"{where} contains {_some(unknown)}, which this architecture does not have; {remedy}")
    if missing:
        raise UserError(f"{where} lacks {_some(missing)}, so it is incomplete or of another architecture; {remedy}")
    for name in sorted(state):
        if state[name].shape != expected[name]:
            raise UserError(
                f"{where} contains {name} of shape {tuple(state[name].shape)}, but its config requires "
                f"{tuple(expected[name])}, so they are not of the same model; {remedy}"
            )
        if not state[name].is_floating_point():
            raise UserError(f"{where} contains {name} of type {state[name].dtype}; give the model before quantization")


def check_finite(state: Mapping[str, Tensor], where: str) -> None:
    """Raises UserError if tensors of a state dict contain infinities or NaN."""
    if wrong := [name for name in sorted(state) if not state[name].float().isfinite().all()]:
        raise UserError(f"{where} contains infinities or NaN in {_some(wrong)}; copy it again, or give an older model")


def _some(names: list[str]) -> str:
    written = [name if name.isprintable() and 0 < len(name) <= 100 else shown(name) for name in names[:3]]
    return ", ".join(written) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
