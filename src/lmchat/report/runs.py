"""Reads the files of runs: logs, settings, samples, checkpoints and evaluation results."""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lmchat.checkpoint.layout import CheckpointPaths, committed_steps
from lmchat.checkpoint.load import open_checkpoint
from lmchat.evaluation.results import Result, read_results, results_file
from lmchat.files import json_object
from lmchat.model.config import GPTConfig
from lmchat.paths import base_dir, expand_user
from lmchat.scaling import flops_per_token, parameter_counts
from lmchat.stage_table import STAGES
from lmchat.types import UserError, user_errors

Points = tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]

AXES = {"step": "optimizer steps", "tokens": "tokens", "seconds": "seconds of training", "flops": "training FLOPs"}
"""Choices for the x axis of curves."""


@dataclass
class StageRun:
    """One stage of a run.

    Attributes:
        records: logged metrics by step, in order; steps repeated by a later start are replaced.
        starts: ``run.json`` of each start.
        config: text of the last ``config.yaml``.
        samples: completions by prompt, of the last evaluation.
        meta: metadata of the last checkpoint, if there is one.
        results: results of ``lmchat eval`` and CORE by task, of the last checkpoint.
        intervals: 95 % intervals of metrics by step.
    """

    stage: str
    records: dict[int, dict[str, float]] = field(default_factory=dict)
    starts: list[dict[str, Any]] = field(default_factory=list)
    config: str = ""
    samples: dict[str, str] = field(default_factory=dict)
    meta: dict[str, Any] | None = None
    results: dict[str, Result] = field(default_factory=dict)
    intervals: dict[int, dict[str, list[float]]] = field(default_factory=dict)

    @property
    def metrics(self) -> list[str]:
        """Names of all metrics that were logged."""
        return sorted({name for record in self.records.values() for name in record})

    def has_curve(self, metric: str) -> bool:
        """Whether a metric was logged more than once."""
        return sum(math.isfinite(record.get(metric, math.nan)) for record in self.records.values()) > 1

    def final(self, metric: str) -> float | None:
        """The last value of a metric."""
        step = self._last_step(metric)
        return None if step is None else self.records[step][metric]

    def final_interval(self, metric: str) -> list[float] | None:
        """The 95 % interval of the last value of a metric, if it was recorded."""
        step = self._last_step(metric)
        return None if step is None else self.intervals.get(step, {}).get(metric)

    def _last_step(self, metric: str) -> int | None:
        return next((step for step, record in reversed(self.records.items()) if metric in record), None)

    @property
    def seconds(self) -> float:
        """Seconds of training, without evaluations."""
        times = self._x_of_steps("seconds")[1]
        return float(times[-1]) if len(times) else 0.0

    @property
    def num_parameters(self) -> int | None:
        return parameter_counts(GPTConfig(**self.meta["model"])).total if self.meta else None

    def curve(self, metric: str, axis: str) -> Points:
        """x and y of a metric against one of `AXES`; empty if x is unknown."""
        logged = [(step, record[metric]) for step, record in self.records.items() if metric in record]
        steps, values = np.array(logged, dtype=np.float64).reshape(-1, 2).T
        known, x = self._x_of_steps(axis)
        if not len(known):
            return steps[:0], values[:0]
        return np.interp(steps, known, x), values

    def _x_of_steps(self, axis: str) -> Points:
        """Steps, and the value of the axis at each."""
        needed = {"train/step_ms"} if axis in ("step", "seconds") else {"train/tokens"}
        steps = [0, *(step for step, record in self.records.items() if needed <= record.keys())]
        records = [self.records[step] for step in steps[1:]]
        if axis == "step":
            x = [float(step) for step in steps]
        elif axis == "seconds":
            laps = np.diff(steps) * [record["train/step_ms"] / 1000 for record in records]
            x = [0.0, *np.cumsum(laps).tolist()]
        else:
            x = [0.0, *(record["train/tokens"] for record in records)]
            if axis == "flops":
                # Sampling is not counted, so there is no total for reinforcement learning.
                if self.meta is None or self.stage == "rl":
                    return np.zeros(0), np.zeros(0)
                x = [tokens * flops_per_token(GPTConfig(**self.meta["model"])) for tokens in x]
        return np.array(steps, dtype=np.float64), np.array(x)


@dataclass(frozen=True)
class Run:
    """All stages of a run, in the order of the pipeline; ``name`` labels its curves."""

    name: str
    stages: dict[str, StageRun]


def read_runs(names: Sequence[str]) -> list[Run]:
    """Reads runs by `read_run`; runs with equal names are labelled by the given argument instead."""
    runs = [read_run(name) for name in names]
    taken = [run.name for run in runs]
    return [
        run if taken.count(run.name) == 1 else replace(run, name=name) for name, run in zip(names, runs, strict=True)
    ]


def read_run(name: str) -> Run:
    """Reads a run.

    Args:
        name: tag of the run, a base folder with one run, ``FOLDER/TAG``, or the folder of the run's checkpoints.

    Raises:
        UserError: there is no such run, or a file of it cannot be read.
    """
    base, tag = _locate(name)
    stages = {stage: _read_stage(base, stage, tag) for stage in STAGES}
    return Run(Path(name).name, {stage: found for stage, found in stages.items() if found.records or found.meta})


def _locate(name: str) -> tuple[Path, str]:
    """Base folder and tag of a run."""
    path = expand_user(name).absolute()
    for base, tag in ((base_dir(), name), (path.parent, path.name), (path.parent.parent, path.name)):
        if tag in _tags(base):
            return base, tag
    tags = _tags(path)
    if len(tags) == 1:
        return path, tags[0]
    if tags:
        raise UserError(f"{name} has the runs {', '.join(tags)}; choose one, as in {name}/{tags[0]}")
    known = ", ".join(_tags(base_dir())) or "none"
    raise UserError(f"there is no run {name}; give a tag in {base_dir()} (there: {known}), or the folder of a run")


def _tags(base: Path) -> list[str]:
    folders = (base / part for stage in STAGES.values() for part in (f"logs/{stage.logs}", stage.checkpoints))
    return sorted({each.name for folder in folders if folder.is_dir() for each in folder.iterdir() if each.is_dir()})


def _read_stage(base: Path, stage: str, tag: str) -> StageRun:
    logs = base / "logs" / STAGES[stage].logs / tag
    numbered = [path for path in logs.glob("version_*") if path.name.removeprefix("version_").isdecimal()]
    versions = sorted(numbered, key=lambda path: int(path.name.removeprefix("version_"))) or [logs]
    # ``lmchat validate`` logs too; only a start of training leaves a ``run.json``.
    trained = [path for path in versions if (path / "run.json").exists()] or versions
    found = StageRun(stage)
    for version in versions:
        for path in sorted(version.rglob("metrics.csv")):
            new = _read_metrics(path)
            # Earlier versions of ``lmchat validate`` logged at step 0.
            _merge(found.records, new if version in trained else [record for record in new if record["step"]])
        for record in _read_json_lines(version / "intervals.jsonl", {"step": int, "intervals": dict}):
            found.intervals.setdefault(record["step"], {}).update(record["intervals"])
        if version not in trained:
            continue
        if (start := version / "run.json").exists():
            found.starts.append(_read_json(start.read_bytes(), start, {"versions": dict}))
        if (version / "config.yaml").exists():
            found.config = (version / "config.yaml").read_text(encoding="utf-8", errors="replace")
        for record in _read_json_lines(version / "samples.jsonl", {"samples": dict}):
            found.samples = {prompt: str(text) for prompt, text in record["samples"].items()}
    found.records = dict(sorted(found.records.items()))
    checkpoints = base / STAGES[stage].checkpoints / tag
    if steps := committed_steps(checkpoints):
        found.meta = open_checkpoint(CheckpointPaths(checkpoints, steps[-1]), files=()).meta
        found.results = read_results(results_file(checkpoints, steps[-1]))
    return found


def _merge(records: dict[int, dict[str, float]], new: Sequence[dict[str, float]]) -> None:
    """Adds the records of a start; one that trained replaces those of earlier starts after its first step."""
    if any(name.startswith("train/") for record in new for name in record):
        first = min(record["step"] for record in new)
        for step in [step for step in records if step > first]:
            del records[step]
    for record in new:
        records.setdefault(int(record.pop("step")), {}).update(record)


def _read_metrics(path: Path) -> list[dict[str, float]]:
    is_log = user_errors(f"{path} is not a metrics log", "move it away", ValueError, csv.Error)
    with is_log, path.open(newline="", encoding="utf-8") as file:
        records = [{key: float(text) for key, text in row.items() if key and text} for row in csv.DictReader(file)]
        if not all(0 <= record.get("step", -1) < 2**62 for record in records):
            raise ValueError("a row has no step")
    return records


def _read_json_lines(path: Path, fields: Mapping[str, type]) -> list[dict[str, Any]]:
    """Records, checked for the given fields and their types; none if there is no such file."""
    lines = path.read_bytes().splitlines() if path.exists() else []
    return [_read_json(line, path, fields) for line in lines]


def _read_json(text: bytes, path: Path, fields: Mapping[str, type]) -> dict[str, Any]:
    with user_errors(f"{path} is damaged", "move it away", ValueError):
        content = json_object(text)
        for name, kind in fields.items():
            if not isinstance(content.get(name), kind):
                raise ValueError(f"{name} is not of type {kind.__name__}")
    return content
