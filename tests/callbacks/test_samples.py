"""Sample completions: what reaches the terminal and the file."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from lmchat.callbacks import samples
from lmchat.callbacks.samples import SAMPLES_FILE, Samples


def test_control_characters_are_written_but_not_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "red\x1b[2J\x9b1A\x07 blue"
    monkeypatch.setattr(samples, "run_log_dir", lambda *_: tmp_path)
    monkeypatch.setattr(Samples, "_complete", lambda *_: [text])
    data = SimpleNamespace(is_due=lambda evaluator: True, evaluators=[None])
    trainer = SimpleNamespace(datamodule=data, is_global_zero=True, loggers=[], global_step=3)
    Samples(["My color is"]).on_validation_end(trainer, None)
    assert "My color is ▸red�[2J�1A� blue" in capsys.readouterr().out
    assert json.loads((tmp_path / SAMPLES_FILE).read_text()) == {"step": 3, "samples": {"My color is": text}}
