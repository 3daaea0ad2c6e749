"""Allocation of large CPU temporaries."""

import ctypes
import sys

_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_LARGEST_BLOCK = 2**30


def tune_malloc() -> bool:
    """Makes glibc's malloc reuse large blocks instead of returning them to the system; returns whether it worked.

    By default, blocks above a threshold of 128 KB to 32 MB are mapped again for every tensor, and a training step on
    the CPU spends much of its time in page faults. The process then keeps its peak memory. Has no effect except on
    Linux with glibc.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, _LARGEST_BLOCK) and mallopt(_M_TRIM_THRESHOLD, 2**31 - 1))
