"""TensorBoard and CSV logs that survive the removal of their folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn


def _make_again(folder: Path) -> bool:
    """Makes a log folder again that was removed during the run; returns whether it was."""
    if folder.is_dir():
        return False
    rank_zero_warn(f"the log folder {folder} was removed; it is made again, without what was logged before")
    folder.mkdir(parents=True, exist_ok=True)
    return True


class RunTensorBoardLogger(TensorBoardLogger):
    """Starts a new event file where its folder was removed: the writer's thread would die of it."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self._restore()
        super().log_metrics(metrics, step)

    def finalize(self, status: str) -> None:
        self._restore()
        super().finalize(status)

    @rank_zero_only
    def _restore(self) -> None:
        if self._experiment is not None and _make_again(Path(self.log_dir)):
            self.experiment.close()
            self._experiment = None


class RunCSVLogger(CSVLogger):
    """Starts a new file where its folder was removed."""

    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        self._restore()
        super().log_metrics(metrics, step)

    def finalize(self, status: str) -> None:
        self._restore()
        super().finalize(status)

    @rank_zero_only
    def _restore(self) -> None:
        if self._experiment is not None:
            _make_again(Path(self.log_dir))
