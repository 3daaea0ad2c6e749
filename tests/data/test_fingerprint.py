"""A run is not resumed on different conversations."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmchat.data.mixture import Mixture, MixturePart, check_fingerprint, conversation_checksums, fingerprint
from lmchat.demo.tasks import Arithmetic
from lmchat.tasks import Identity, JSONLConversations
from lmchat.types import UserError

CHAT = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi."}]


def take(mixture: Mixture, **settings: object) -> dict[str, str]:
    return fingerprint(mixture, conversation_checksums(mixture), **settings)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Mixture]:
    """Creates a mixture whose parts a test can change."""

    def make(size: int = 12, epochs: int = 2, answer: str = "Hi.", seed: int = 42, others: Any = ()) -> Mixture:
        last = [{"role": "user", "content": "Bye"}, {"role": "assistant", "content": answer}]
        path = tmp_path / "chat.jsonl"
        path.write_text("\n".join(map(json.dumps, [CHAT, CHAT, last])))
        parts = [MixturePart(Arithmetic(size=size), epochs), MixturePart(JSONLConversations(str(path))), *others]
        return Mixture(parts, seed)

    return make


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"size": 13}, {"Arithmetic/train"}),
        ({"epochs": 3}, {"Arithmetic/train"}),
        ({"answer": "Hi!"}, {"JSONLConversations/chat"}),
        ({"seed": 43}, {"order"}),
        ({"others": [MixturePart(Identity(size=3))]}, {"Identity/train"}),
        ({"others": [MixturePart(Arithmetic(size=1))]}, {"Arithmetic/train"}),
    ],
)
def test_only_changed_parts_are_reported(
    make: Callable[..., Mixture], changes: dict[str, Any], named: set[str]
) -> None:
    before = take(make())
    check_fingerprint(before, take(make()))
    with pytest.raises(UserError, match=r"another --model\.tag") as caught:
        check_fingerprint(before, take(make(**changes)))
    names = {"Arithmetic/train", "JSONLConversations/chat", "Identity/train", "order"}
    assert {name for name in names if f"{name}: " in str(caught.value)} == named


def test_settings_are_compared_too(make: Callable[..., Mixture]) -> None:
    mixture = make()
    with pytest.raises(UserError, match="rows per step: 8, now 4"):
        check_fingerprint(take(mixture, **{"rows per step": 8}), take(mixture, **{"rows per step": 4}))


def test_fingerprinting_is_cheap_compared_with_rendering() -> None:
    size = 200_000
    mixture = Mixture([MixturePart(Arithmetic(size=size)), MixturePart(Identity(size=size))])
    checksums = np.random.default_rng(0).integers(0, 1 << 32, len(mixture), dtype=np.uint32)
    assert len(mixture.part_numbers) == 2 * size  # computes the order, which is needed anyway
    started = time.process_time()
    fingerprint(mixture, checksums)
    assert time.process_time() - started < 1
