"""A run whose log folder is removed warns once and continues; one whose logs cannot be written names them."""

from __future__ import annotations

import csv
import errno
import functools
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import lightning as L
import pytest
from lightning.pytorch.loggers import tensorboard
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from forked import exit_statuses, python, start
from lmchat.__main__ import main
from lmchat.cli import loggers
from lmchat.cli.loggers import RunCSVLogger, RunTensorBoardLogger
from tiny_fit import config_options

OWN = """
trainer: {max_steps: 6, callbacks: [{class_path: faults.RemoveLogs}]}
model: {init_args: {tag: tiny}}
monitor: {every_n_steps: 1}
eval: {every_n_steps: 2}
samples: {max_new_tokens: 2, prompts: [a]}
"""


def test_training_continues_if_its_log_folder_is_removed(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    monkeypatch.setenv("LMCHAT_BASE_DIR", str(base))

    class RemoveLogs(L.Callback):
        def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
            if trainer.global_step == 3:
                shutil.rmtree(base / "logs", ignore_errors=True)

    monkeypatch.setattr("faults.RemoveLogs", RemoveLogs, raising=False)
    failed: list[Any] = []
    monkeypatch.setattr(threading, "excepthook", failed.append)
    # An earlier test may have installed the hook of `RunTensorBoardLogger`, which was replaced above.
    monkeypatch.setattr(loggers, "_silence_writer_thread", functools.cache(loggers._silence_writer_thread.__wrapped__))
    assert main(["fit", *config_options(base, OWN)]) == 0
    assert not failed
    assert len({str(each.message) for each in recwarn if "was removed" in str(each.message)}) <= 2

    folder = base / "logs" / "pretrain" / "tiny" / "version_0"
    with (folder / "csv" / "metrics.csv").open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert steps[-3:] == [4, 5, 6]
    events = EventAccumulator(str(folder)).Reload()
    assert [event.step for event in events.Scalars("train/loss")][-3:] == [4, 5, 6]


def test_a_folder_that_is_removed_while_a_record_is_written_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    logger = RunTensorBoardLogger(tmp_path, name="run")
    logger.log_metrics({"loss": 1.0}, step=1)
    logger.experiment.flush()
    shutil.rmtree(tmp_path / "run")
    logger.experiment.add_scalar("lost", 1.0, 1)  # its thread fails
    with pytest.raises(FileNotFoundError):
        logger.experiment.flush()
    Path(logger.log_dir).mkdir(parents=True)
    logger.log_metrics({"loss": 2.0}, step=2)
    logger.finalize("success")
    assert [event.value for event in EventAccumulator(logger.log_dir).Reload().Scalars("loss")] == [2.0]


def test_a_failed_write_of_a_new_column_keeps_the_records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    logger = RunCSVLogger(tmp_path, name="run", version="")
    logger.log_metrics({"loss": 1.0}, step=1)
    logger.save()
    logger.log_metrics({"accuracy": 2.0}, step=2)
    with monkeypatch.context() as full_disk:
        full_disk.setattr(csv.DictWriter, "writerows", raise_disk_full)
        with pytest.raises(OSError, match=r"metrics\.csv"):
            logger.save()
    assert (tmp_path / "run" / "metrics.csv").read_text().split() == ["loss,step", "1.0,1"]


def test_a_folder_that_is_removed_while_settings_are_written_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = RunTensorBoardLogger(tmp_path, name="run")
    logger.log_metrics({"loss": 1.0}, step=1)
    write, removed = tensorboard.save_hparams_to_yaml, []

    def remove_once(*args: Any) -> None:
        if not removed:
            removed.append(shutil.rmtree(logger.log_dir))
        write(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(tensorboard, "save_hparams_to_yaml", remove_once)
    logger.save()
    assert removed and (Path(logger.log_dir) / "hparams.yaml").exists()


def raise_disk_full(*_: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


RUN_WITH_LIMIT = """
import resource, sys, tempfile
tempfile.gettempdir()
sys.stdout, sys.stderr = (open(number, "w", closefd=False) for number in (1, 2))  # the former were no pipes
resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))
from lmchat.__main__ import main
sys.exit(main({args}))
"""


@pytest.mark.parametrize(("size", "file"), [(0, "version_0"), (1024, "version_0/config.yaml")])
def test_a_disk_that_is_full_at_the_first_records_is_reported_with_the_file(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int, file: str
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_base, base)
    monkeypatch.setenv("LMCHAT_BASE_DIR", str(base))
    assert main(["data", "tokenize"]) == 0
    options = config_options(base, "{trainer: {max_steps: 2}, model: {init_args: {tag: tiny}}}")
    os.mkfifo(pipe := tmp_path / "output")  # the limit is not for pipes
    run = start(python, RUN_WITH_LIMIT.format(size=size, args=["fit", *options]), output=pipe)
    output = pipe.read_text()
    assert exit_statuses([run]) == [2], output
    assert output.splitlines()[-1] == (
        f"lmchat: {base}/logs/pretrain/tiny/{file}: File too large; make room and run it again"
    )
    assert "Traceback" not in output
