"""TensorBoard and CSV logs that survive the removal of their folder and name it in errors."""

import contextlib
import csv
import functools
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn

from lmchat.files import naming_errors, replacing
from lmchat.strategies.lightning_internals import set_header_writer


class _RestoresFolder:
    """Mixin of a logger: creates its folder again before it writes, if the folder was removed during the run.

    Errors, such as those of a full disk, name the folder.
    """

    _experiment: Any
    log_dir: Any

    @property
    def experiment(self) -> Any:
        with naming_errors(Path(self.log_dir)):
            return super().experiment  # type: ignore[misc]

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        self._write(super().log_metrics, *args, **kwargs)  # type: ignore[misc]

    def save(self) -> None:
        self._write(super().save)  # type: ignore[misc]

    def finalize(self, status: str) -> None:
        self._write(super().finalize, status)  # type: ignore[misc]

    def _write(self, write: Callable[..., None], *args: Any, **kwargs: Any) -> None:
        self._restore_folder()
        with naming_errors(Path(self.log_dir)):
            try:
                write(*args, **kwargs)
            except (OSError, ValueError, RuntimeError) as error:
                cause = error.__cause__ if isinstance(error, ValueError) else error  # Lightning wraps it
                if not isinstance(cause, FileNotFoundError) and Path(self.log_dir).is_dir():
                    raise (cause if isinstance(cause, OSError) else error) from None
                # The folder was removed after the check.
                Path(self.log_dir).mkdir(parents=True, exist_ok=True)
                self._restart()
                write(*args, **kwargs)

    @rank_zero_only
    def _restore_folder(self) -> None:
        folder = Path(self.log_dir)
        if self._experiment is None or folder.is_dir():
            return
        rank_zero_warn(f"the log folder {folder} was removed; a new one is created, earlier records are lost")
        folder.mkdir(parents=True, exist_ok=True)
        self._restart()

    def _restart(self) -> None:
        """Called after the folder has been created again."""


class RunTensorBoardLogger(_RestoresFolder, TensorBoardLogger):
    """Starts a new event file after its folder was removed; otherwise the thread of the writer would fail."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _silence_writer_thread()

    def _restart(self) -> None:
        with contextlib.suppress(OSError):
            self.experiment.close()
        self._experiment = None


class RunCSVLogger(_RestoresFolder, CSVLogger):
    """Starts a new file after its folder was removed; a kill or a full disk leaves no emptied file."""

    @property
    def experiment(self) -> Any:
        writer = super().experiment
        set_header_writer(writer, partial(_rewrite, Path(self.log_dir) / "metrics.csv"))
        return writer


def _rewrite(path: Path, columns: list[str]) -> None:
    """Adds columns to a CSV file."""
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    with replacing(path) as unfinished, unfinished.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


@functools.cache
def _silence_writer_thread() -> None:
    """Prints no traceback of TensorBoard's thread: the next record, or the end of the run, raises its error again."""
    from tensorboard.summary.writer.event_file_writer import _AsyncWriterThread  # type: ignore[import-untyped]

    usual = threading.excepthook

    def report(args: threading.ExceptHookArgs) -> None:
        if not (isinstance(args.thread, _AsyncWriterThread) and isinstance(args.exc_value, OSError)):
            usual(args)

    threading.excepthook = report
