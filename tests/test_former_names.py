"""Former names of classes and option groups are accepted, with a warning that has the new name."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonargparse import get_loader

from lmchat.__main__ import main
from lmchat.cli.fit import read_data_module
from lmchat.cli.former_names import CLASSES, accept_former_names, rename_argument
from lmchat.demo.tasks import Arithmetic
from lmchat.types import UserError
from tiny_fit import config_options

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
    assert [rename_argument(argument) for argument in arguments] == [
        "fit",
        "--non_finite_guard.action",
        "skip",
        f"--trainer.callbacks+={CLASSES[former]}",
        CLASSES[former],
    ]


def bomb() -> str:
    """The ninth power of nine values, by aliases."""
    levels = ["a0: &a0 [1]"] + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    return "\n".join(levels)


@pytest.fixture
def usual_recursion_limit() -> Iterator[None]:
    """Python's own, which torch's compiler raises for the whole process."""
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(1000)
    yield
    sys.setrecursionlimit(before)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (bomb(), "its aliases stand for more than 1,000,000 values"),
        ("trainer: {max_steps: " + "9" * 5000 + "}", "value has 5000 digits"),
        ("trainer:\n  max_steps: 010", "line 2: 010 is a number in base 8 or 60; use base 10, or quotes"),
        ("trainer: {max_steps: 1:30}", "line 1: 1:30 is a number in base 8 or 60"),
        ("model: {init_args: {matrix_lr: 0:30.5}}", "line 1: 0:30.5 is a number in base 8 or 60"),
        ('checkpoint: {dirpath: "a\\0b"}', "line 1: a text has a NUL character"),
        ("samples: {prompts: " + "[" * 900 + "]" * 900 + "}", "nested too deeply"),
        ("'max steps': 1", 'has the key "max steps", which is not an option'),
        ("'': 1", 'has the key "", which is not an option'),
        ("trainer: {max_steps: 1}\nmodel: {}\ntrainer: {max_steps: 2}", "twice, the second time in line 3"),
        ("model: {init_args: {depth: 2, depth: 3}}", "sets depth twice, the second time in line 1"),
        ("seed_everything: null", "--seed_everything is None; it must be a number"),
        ("model: {class_path: PretrainModule, init_args: {depth: 1}, dict_kwargs: {x: 1}}", "PretrainModule cannot be"),
    ],
)
@pytest.mark.usefixtures("usual_recursion_limit")
def test_invalid_configs_are_refused(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *config_options(tmp_path, text)]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_texts_that_look_like_numbers_in_another_base_are_kept() -> None:
    accept_former_names()
    texts = get_loader("yaml")("['010', \"1:30\", 00:12:00:00, 08-09, 1.2.3, 089, 0, -7, 0x1F, 1e3]")
    assert texts == ["010", "1:30", "00:12:00:00", "08-09", "1.2.3", "089", 0, -7, 31, 1000.0]


def test_a_recursive_alias_is_refused(tmp_path: Path) -> None:
    config = tmp_path / "endless.yaml"
    config.write_text("data: &data\n  train: *data\n")
    assert yaml.safe_load(config.read_text())
    with pytest.raises(Exception, match="alias refers to the value that contains it") as caught:
        read_data_module([config])
    assert type(caught.value).__name__ in ("ArgumentError", UserError.__name__)
