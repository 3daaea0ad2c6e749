"""Saves and restores the states of the random number generators: torch (CPU, CUDA), NumPy, Python."""

import random
from typing import Any

import numpy as np
import torch

from lmchat.types import user_errors


def capture_rng() -> dict[str, Any]:
    """Copies the states of this process's generators to tensors and plain values; CUDA: of the current device."""
    version, python_words, python_gauss = random.getstate()
    name, numpy_words, position, has_gauss, gauss = np.random.get_state(legacy=True)  # noqa: NPY002
    assert name == "MT19937"
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None,
        "numpy": [torch.from_numpy(np.asarray(numpy_words, dtype=np.int64)), position, has_gauss, gauss],
        "python": [version, torch.tensor(python_words), python_gauss],
    }


def restore_rng(state: dict[str, Any]) -> None:
    """Restores a state of `capture_rng`. The CUDA state is ignored if it, or a CUDA device, is missing.

    Raises:
        UserError: ``state`` is malformed, e.g. from a damaged checkpoint.
    """
    damage = (KeyError, TypeError, ValueError, AttributeError, RuntimeError)
    with user_errors("the saved random number state is damaged", "use an older checkpoint", *damage):
        torch.set_rng_state(state["torch"])
        if state["cuda"] is not None and torch.cuda.is_available():
            torch.cuda.set_rng_state(state["cuda"])
        words, position, has_gauss, gauss = state["numpy"]
        np.random.set_state(("MT19937", words.numpy().astype(np.uint32), position, has_gauss, gauss))  # noqa: NPY002
        version, words, gauss = state["python"]
        random.setstate((version, tuple(words.tolist()), gauss))
