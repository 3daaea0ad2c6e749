"""Fingerprint of a run's conversations; a run refuses to resume on different data."""

from __future__ import annotations

import hashlib
import json
import zlib
from typing import Any

import numpy as np
import numpy.typing as npt

from lmchat.data.mixture import Mixture
from lmchat.option_checks import damaged_position
from lmchat.types import UserError

_ORDER = "order"


def conversation_checksums(mixture: Mixture) -> npt.NDArray[np.uint32]:
    """(conversations,) uint32, CRC-32 of the messages of each conversation."""
    messages = (json.dumps(conversation["messages"], sort_keys=True) for conversation in mixture)
    return np.fromiter((zlib.crc32(text.encode()) for text in messages), np.uint32, len(mixture))


def fingerprint(mixture: Mixture, checksums: npt.NDArray[np.uint32], **settings: object) -> dict[str, str]:
    """Fingerprint of a mixture: a digest per task by name, a digest of the order, and settings.

    Args:
        checksums: (conversations,) uint32 checksums in the order of the mixture.
        settings: other settings that determine the batches; keys are their names in messages.
    """
    found = {name: str(value) for name, value in settings.items()}
    names = [part.task.name for part in mixture.parts]
    numbers = mixture.part_numbers
    for name in dict.fromkeys(names):
        own = checksums[np.isin(numbers, [number for number, other in enumerate(names) if other == name])]
        own.sort()  # so that other tasks cannot change this digest
        found[name] = f"{len(own):,} conversations {_digest(own)}"
    return {**found, _ORDER: _digest(checksums)}


def check_fingerprint(resumed: Any, current: dict[str, str]) -> None:
    """Raises `UserError` that lists the differences, if there are any."""
    if not isinstance(resumed, dict):
        raise damaged_position("it names no data")
    names = [name for name in {**resumed, **current} if resumed.get(name) != current.get(name)]
    if not names:
        return
    if len(names) > 1 and _ORDER in names:
        names.remove(_ORDER)  # it follows from the others
    changes = "; ".join(f"{name}: {resumed.get(name, 'none')}, now {current.get(name, 'none')}" for name in names)
    raise UserError(
        f"the run to resume was started with different data ({changes}); restore that data, or "
        "start a new run with another --model.tag and --ckpt_path a checkpoint of the stage before"
    )


def _digest(checksums: npt.NDArray[np.uint32]) -> str:
    return hashlib.sha256(np.ascontiguousarray(checksums).data).hexdigest()[:8]
