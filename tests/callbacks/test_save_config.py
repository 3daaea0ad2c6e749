"""The settings of a run are saved in one file."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import yaml

from lmchat.__main__ import main
from lmchat.callbacks.save_config import SaveConfig
from tiny_fit import CONFIG, config_options


def test_settings_of_several_files_are_saved_in_one(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a change of the current folder, since threads of the run open relative paths at the same time."""
    save = SaveConfig.save_config

    def save_in_place(*args: Any) -> None:
        with monkeypatch.context() as context:
            context.setattr(os, "chdir", lambda folder: pytest.fail(f"the current folder becomes {folder}"))
            save(*args)

    monkeypatch.setattr(SaveConfig, "save_config", save_in_place)
    data = yaml.safe_load(CONFIG)["data"]
    (base / "data.yaml").write_text(yaml.safe_dump(data))
    options = config_options(base, "{trainer: {max_steps: 1}, eval: {at_start: false, at_end: false}}")
    assert main(["fit", *options, "--data", str(base / "data.yaml")]) == 0
    [saved] = (base / "logs").rglob("config.yaml")
    assert data["init_args"].items() <= yaml.safe_load(saved.read_text())["data"]["init_args"].items()
