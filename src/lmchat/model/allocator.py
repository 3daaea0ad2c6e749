"""Memory that large CPU temporaries come from."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LARGEST_BLOCK = 2**30


def tune_malloc() -> bool:
    """Tell glibc's malloc to reuse large blocks instead of returning each to the system; True where it took effect.

    By default blocks from 128 KB to 32 MB on are mapped afresh for every tensor, and a training step on the CPU spends
    a large share of its time in page faults. The process keeps its peak memory in exchange. Elsewhere than on
    Linux with glibc nothing happens.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_BLOCK) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
