"""The GPU benchmark on a CPU at toy size; a part that fails or takes too long does not affect the others."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).resolve().parent.parent / "benchmarks"))
import gpu_run


def test_results_are_saved_as_they_arrive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cudnn", "attention", "decode"):
        gpu_run.run_part(name, tmp_path, toy=True)

    def breaks(shapes: gpu_run.Shapes, report: gpu_run.Report) -> None:
        report(first=1)
        raise RuntimeError("the card fell off the bus")

    monkeypatch.setitem(gpu_run.PARTS, "d12", breaks)
    with pytest.raises(RuntimeError, match="bus"):
        gpu_run.run_part("d12", tmp_path, toy=True)
    results = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert results[-1] == {"part": "d12", "first": 1}
    assert {"cudnn", "attention", "decode"} <= {each["part"] for each in results}
    assert all(each["off"] < 1e-5 for each in results if each["part"] == "attention")
    assert "| d12 | first 1 |" in "\n".join(gpu_run.table(tmp_path / "results.jsonl"))


def test_a_part_is_stopped_at_its_time_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(gpu_run.LIMITS, "environment", 0.05 / gpu_run.SLOWER_CPU)
    ended = gpu_run.start_part("environment", tmp_path, toy=True)
    assert ended["status"] == "stopped after 0.05 s"


def test_the_parts_fit_into_ten_minutes() -> None:
    assert set(gpu_run.LIMITS) == set(gpu_run.PARTS) and sum(gpu_run.LIMITS.values()) < 570
