"""Former names of classes and option groups are accepted, with a line that names the new one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from lmchat.cli.fit import read_data_module
from lmchat.cli.renamed import CLASSES, rename_arguments
from lmchat.demo.tasks import Arithmetic
from lmchat.types import UserError

DATA = """
data:
  class_path: lmchat.stages.grpo.RolloutDataModule
  init_args:
    train: [{task: {class_path: Arithmetic, init_args: {split: train, size: 8}}}]
    eval_task: {class_path: lmchat.tasks.Arithmetic, init_args: {split: test, size: 1}}
non_finite_loss: {action: skip}
"""


def test_former_names_in_configs_are_accepted(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    config = tmp_path / "old.yaml"
    config.write_text(DATA)
    data: Any = read_data_module([config])
    assert isinstance(data.eval_task, Arithmetic)
    told = " ".join(str(warning.message) for warning in recwarn)
    assert "Arithmetic is now called lmchat.demo.tasks.Arithmetic" in told
    assert "non_finite_loss is now called non_finite_guard" in told


def test_former_names_in_arguments_are_accepted() -> None:
    former = "lmchat.callbacks.time_budget.TimeBudget"
    arguments = ["fit", "--non_finite_loss.action", "skip", f"--trainer.callbacks+={former}", former]
    assert rename_arguments(arguments) == [
        "fit",
        "--non_finite_guard.action",
        "skip",
        f"--trainer.callbacks+={CLASSES[former]}",
        CLASSES[former],
    ]


def test_a_recursive_alias_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "endless.yaml"
    config.write_text("data: &data\n  train: *data\n")
    assert yaml.safe_load(config.read_text())
    with pytest.raises(Exception, match="alias refers to the value that contains it") as caught:
        read_data_module([config])
    assert type(caught.value).__name__ in ("ArgumentError", UserError.__name__)
