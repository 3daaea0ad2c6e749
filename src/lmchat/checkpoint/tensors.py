"""Checks names, shapes and types of a model's tensors against its config."""

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor

from lmchat.checkpoint.meta_schema import shown
from lmchat.model.config import GPTConfig
from lmchat.model.gpt import GPT
from lmchat.types import UserError


def empty_state(config: GPTConfig) -> dict[str, Tensor]:
    """The state dict of a GPT with this config, on the meta device."""
    with torch.device("meta"):
        return GPT(config).state_dict()


def check_tensors(state: Mapping[Any, Any], expected: Mapping[str, Tensor], where: str, remedy: str) -> None:
    """Raises UserError unless a state dict has the names and shapes of ``expected``, in dense floating-point tensors.

    The message begins with ``where`` and ends with ``remedy``.
    """
    unknown, missing = state.keys() - expected.keys(), expected.keys() - state.keys()
    if unknown:
        raise UserError(f"{where} contains {_some(unknown)}, which this architecture does not have; {remedy}")
    if missing:
        raise UserError(f"{where} lacks {_some(missing)}, so it is incomplete or of another architecture; {remedy}")
    for name, tensor in sorted(state.items()):
        dense = isinstance(tensor, Tensor) and tensor.layout is torch.strided and not tensor.is_nested
        if not dense or tensor.device.type != "cpu":
            raise UserError(f"{where} contains {name}, which is not a dense tensor on the CPU; {remedy}")
        if tensor.shape != expected[name].shape:
            raise UserError(
                f"{where} contains {name} of shape {tuple(tensor.shape)}, but its config requires "
                f"{tuple(expected[name].shape)}, so they are not of the same model; {remedy}"
            )
        if not tensor.is_floating_point():
            raise UserError(f"{where} contains {name} of type {tensor.dtype}; give the model before quantization")


def check_finite(state: Mapping[str, Tensor], where: str) -> None:
    """Raises UserError if tensors of a state dict contain infinities or NaN."""
    if wrong := [name for name in sorted(state) if not state[name].float().isfinite().all()]:
        raise UserError(f"{where} contains infinities or NaN in {_some(wrong)}; copy it again, or give an older model")


def _some(names: Collection[Any]) -> str:
    first = [str(name) for name in sorted(names, key=str)[:3]]
    written = [name if name.isprintable() and 0 < len(name) <= 100 else shown(name) for name in first]
    return ", ".join(written) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
