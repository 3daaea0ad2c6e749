"""The fastest correct backend is chosen per window and remembered; kernels and clock are mocks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lmchat.model import attention_timing
from lmchat.model.attention import BACKENDS, attend_masked
from lmchat.model.attention_timing import choose_by_timing, use_backends
from lmchat.model.config import GPTConfig
from lmchat.model.gpt import GPT

CONFIG = GPTConfig(sequence_len=32, vocab_size=70, n_layer=3, n_head=2, n_kv_head=2, n_embd=32, window_pattern="SSL")


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int, bool]]:
    """Records what is timed: backend, window, documents. flash takes 2 ms, cuDNN 1, flex 3, and 1 with documents."""
    calls: list[tuple[str, int, bool]] = []

    def kernel(name: str):  # type: ignore[no-untyped-def]
        def attend(q, k, v, window, starts=None):  # type: ignore[no-untyped-def]
            assert not torch.backends.cuda.cudnn_sdp_enabled()  # it would run in place of flash
            calls.append((name, window, starts is not None))
            return attend_masked(q, k, v, window, starts)

        return attend

    def milliseconds(step: Callable[[], object]) -> float:
        calls.clear()
        step()
        ((name, _, documents),) = calls
        measured.append(calls[0])
        return {"flash": 2, "cudnn": 1, "flex": 1 if documents else 3}[name]

    measured: list[tuple[str, int, bool]] = []
    for name in ("flash", "cudnn", "flex"):
        monkeypatch.setitem(BACKENDS, name, kernel(name))
    monkeypatch.setattr(attention_timing, "milliseconds", milliseconds)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a card")
    return measured


def test_the_fastest_is_chosen_and_remembered(timed: list[tuple[str, int, bool]], tmp_path: Path) -> None:
    net, file = GPT(CONFIG), tmp_path / "attention.json"
    chosen = choose_by_timing(net, 2, False, file)
    assert chosen == {16: "flash", 32: "cudnn"}
    assert timed == [(name, 16, False) for name in ("flash", "flex")] + [
        (name, 32, False) for name in ("flash", "cudnn", "flex")
    ]
    use_backends(net, chosen)
    assert [block.attn.attend for block in net.blocks] == [BACKENDS[name] for name in ("flash", "flash", "cudnn")]
    assert net.attention_backend == "flash, cudnn"
    timed.clear()
    assert choose_by_timing(net, 2, False, file) == chosen and not timed
    assert choose_by_timing(net, 2, True, file) == {16: "flex", 32: "flex"}
    assert {name for name, _, documents in timed if documents} == {"flash", "flex"}
    for content in ("{damaged", "[1]", file.read_text().replace('"cudnn"', "[2]").replace('"flash"', '"later"')):
        file.write_text(content)
        assert choose_by_timing(net, 2, False, file) == chosen


def test_choices_are_of_one_card_and_version_and_an_unwritable_file_is_none(
    timed: list[tuple[str, int, bool]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    net, file = GPT(CONFIG), tmp_path / "attention.json"
    chosen = choose_by_timing(net, 2, False, file)
    for owner, name, value in (
        (torch, "__version__", "2.99"),
        (torch.cuda, "get_device_name", lambda device: "another card"),
        (torch.backends.cudnn, "version", lambda: 1),
    ):
        timed.clear()
        monkeypatch.setattr(owner, name, value)
        assert choose_by_timing(net, 2, False, file) == chosen and len(timed) == 5
    timed.clear()
    assert choose_by_timing(net, 2, False, file) == chosen and not timed
    assert choose_by_timing(net, 2, False, tmp_path / "no_folder" / "attention.json") == chosen


def test_wrong_and_failing_kernels_are_skipped(
    timed: list[tuple[str, int, bool]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setitem(BACKENDS, "cudnn", lambda q, k, v, window, starts=None: attend_masked(q, k, v, window) * 2)
    monkeypatch.setitem(BACKENDS, "flash", lambda q, k, v, window, starts=None: 1 / 0)
    assert choose_by_timing(GPT(CONFIG), 2, False, tmp_path / "a.json") == {16: "flex", 32: "flex"}
    monkeypatch.setitem(BACKENDS, "flex", BACKENDS["flash"])
    assert choose_by_timing(GPT(CONFIG), 2, False, tmp_path / "b.json") == {16: "banded", 32: "banded"}
