"""Train/test split by a hash of the content."""

from __future__ import annotations

import zlib
from typing import Literal

Split = Literal["train", "test"]

TEST_SHARE = 10
"""One in this many keys is a test key."""


def in_split(key: str, split: Split) -> bool:
    """Whether ``key`` belongs to ``split``.

    A hash of the key decides, so the splits of generated examples are disjoint for all options of the tasks.
    """
    return (zlib.crc32(key.encode()) % TEST_SHARE == 0) == (split == "test")
