"""TensorBoard and CSV logs that survive the removal of their folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities.rank_zero import rank_zero_only, rank_zero_warn


class _RestoresFolder:
    """Mixin of a logger: creates its folder again before it writes, if the folder was removed during the run."""

    _experiment: Any
    log_dir: Any

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        self._restore_folder()
        super().log_metrics(*args, **kwargs)  # type: ignore[misc]

    def finalize(self, status: str) -> None:
        self._restore_folder()
        super().finalize(status)  # type: ignore[misc]

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

    def _restart(self) -> None:
        self.experiment.close()
        self._experiment = None


class RunCSVLogger(_RestoresFolder, CSVLogger):
    """Starts a new file after its folder was removed."""
