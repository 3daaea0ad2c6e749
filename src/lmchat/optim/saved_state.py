"""Saved optimizer state: tensors by parameter name, restored from the pieces that any number of ranks saved."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor

from lmchat.types import UserError


def restore(tensor: Tensor, pieces: Sequence[dict[str, Any]], key: str, start: int, name: str) -> None:
    """Fills ``tensor``, rows of state ``key`` of parameter ``name`` from ``start`` on, from saved pieces.

    Pieces may overlap. Only the needed rows are read from memory-mapped files.
    """
    if tensor.ndim == 0 and pieces:
        tensor.copy_(pieces[0][key])
        return
    done, rows = 0, len(tensor) if tensor.ndim else 1
    for piece in sorted(pieces, key=lambda piece: piece["row_start"]):
        first = start + done - piece["row_start"]
        if first < 0:
            break
        found = piece[key][first : first + rows - done]
        tensor[done : done + len(found)] = found
        done += len(found)
    if done < rows:
        raise UserError(
            f"rows {start + done} to {start + rows} of {key} of {name} are not in the saved optimizer state; "
            "give the files of all ranks"
        )


def check_same_parameters(groups: Iterable[dict[str, Any]], saved_groups: Iterable[dict[str, Any]]) -> None:
    """Raises UserError unless the parameters of ``groups`` have the saved names, groups and shapes."""
    here, saved = (
        {
            (group["name"], name, tuple(shape))
            for group in each
            for name, shape in zip(group["param_names"], group["param_shapes"], strict=True)
        }
        for each in (map(saved_group, groups), saved_groups)
    )
    if here != saved:
        group, name, shape = min(here ^ saved)
        where = "in the model but not saved" if (group, name, shape) in here else "saved but not in the model"
        raise UserError(
            f"optimizer state does not fit: parameter {name} of shape {shape} in group {group} is {where}; "
            "resume with the model that was saved"
        )


def saved_group(group: dict[str, Any]) -> dict[str, Any]:
    """A parameter group as it is saved: with ``param_shapes`` instead of parameters."""
    shapes = [tuple(param.shape) for param in group["params"]]
    return {key: value for key, value in group.items() if key != "params"} | {"param_shapes": shapes}
