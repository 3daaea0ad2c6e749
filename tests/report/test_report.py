"""Reports of a run that was trained, continued and evaluated, and of runs with malicious names."""

from __future__ import annotations

import csv
import json
import re
import shutil
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from headless import browser  # noqa: F401  (a fixture)
from lmchat.__main__ import main
from lmchat.evaluation.results import read_results, results_file
from lmchat.files import write_json
from lmchat.model.config import GPTConfig
from lmchat.model.gpt import GPT
from lmchat.report.charts import MAX_POINTS, line_chart, number, ticks
from lmchat.report.page import html_page, markdown_page
from lmchat.report.runs import AXES, Run, StageRun, read_run
from lmchat.report.summary import final_metrics
from lmchat.scaling import flops_per_token
from lmchat.types import UserError
from tiny_fit import config_options

OWN = """
trainer: {max_steps: 6}
model: {init_args: {tag: reported}}
eval: {every_n_steps: 3}
monitor: {every_n_steps: 1}
checkpoint: {every_n_steps: 3}
samples: {max_new_tokens: 4, prompts: ["a < b", "c"]}
"""

RESULTS: dict[str, Any] = {
    "ARC-Easy": {"accuracy": 0.5, "questions": 4, "interval_95": [0.15, 0.85]},
    "ChatCORE": {"centered": 0.25, "interval_95": [0.125, 0.375], "tasks": ["ARC-Easy"]},
    "harness/own": {"limit": None, "alias": "own", "acc,none": 0.625, "acc_stderr,none": 0.1, "weights": "abc"},
    "MMLU": {"error": "no data"},
}


@pytest.fixture(scope="module")
def base(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps, continued to 8 from its checkpoint of step 3."""
    base = tmp_path_factory.mktemp("report") / "base"
    shutil.copytree(tiny_base, base)
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("LMCHAT_BASE_DIR", str(base))
        options = config_options(base, OWN)
        assert main(["fit", *options]) == 0
        checkpoints = base / "base_checkpoints" / "reported"
        for path in checkpoints.glob("*_000006*"):
            path.unlink()
        assert main(["fit", *options, "--trainer.max_steps", "8", "--ckpt_path", "last"]) == 0
        assert main(["validate", *options, "--eval.every_n_steps", "7", "--ckpt_path", str(checkpoints)]) == 0
    write_json(results_file(checkpoints, 8), RESULTS)
    record = {"step": 8, "intervals": {"val/bpb": [1.125, 9.875]}}
    (base / "logs/pretrain/reported/version_1/intervals.jsonl").write_text(json.dumps(record))
    return base


@pytest.fixture(scope="module")
def stage(base: Path) -> StageRun:
    return read_run(str(base)).stages["pretrain"]


class Page(HTMLParser):
    """Tags, attributes and text of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())


def logged(base: Path) -> list[dict[str, float]]:
    """Rows of the second start's log."""
    (path,) = (base / "logs" / "pretrain" / "reported" / "version_1").rglob("metrics.csv")
    with path.open() as file:
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(file)]


def test_a_continued_run_is_one_curve(stage: StageRun, base: Path) -> None:
    steps, losses = stage.curve("train/loss", "step")
    assert steps.tolist() == [1, 2, 3, 4, 5, 6, 7, 8]
    again = {int(row["step"]): row["train/loss"] for row in logged(base) if "train/loss" in row}
    assert sorted(again) == [4, 5, 6, 7, 8]
    assert losses[3:].tolist() == [again[step] for step in (4, 5, 6, 7, 8)]


def test_axes_are_tokens_flops_and_seconds_at_the_steps(stage: StageRun) -> None:
    tokens, _ = stage.curve("train/loss", "tokens")
    assert tokens.tolist() == [128 * step for step in range(1, 9)]
    assert stage.meta is not None
    flops, _ = stage.curve("train/loss", "flops")
    np.testing.assert_allclose(flops, tokens * flops_per_token(GPTConfig(**stage.meta["model"])))
    seconds, _ = stage.curve("train/loss", "seconds")
    laps = [stage.records[step]["train/step_ms"] / 1000 for step in range(1, 9)]
    np.testing.assert_allclose(seconds, np.cumsum(laps))
    evaluated, _ = stage.curve("val/bpb", "tokens")
    assert evaluated.tolist() == [0, 384, 768, 1024]


def test_origin_is_recorded(stage: StageRun, base: Path) -> None:
    assert [start["first_step"] for start in stage.starts] == [1, 4]
    assert all(start["versions"]["torch"].startswith(torch.__version__.split("+")[0]) for start in stage.starts)
    assert all(start["seed"] == "42" and start["ranks"] == 1 and start["data"] for start in stage.starts)
    assert stage.samples.keys() == {"a < b", "c"}
    assert "every_n_steps: 3" in stage.config and "every_n_steps: 7" not in stage.config  # of training, not validate
    assert stage.num_parameters == sum(p.numel() for p in GPT(GPTConfig(**stage.meta["model"])).parameters())  # type: ignore[index]


def test_the_command_writes_page_and_markdown(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMCHAT_BASE_DIR", str(base))
    output = tmp_path / "new" / "page.html"
    assert main(["report", "reported", str(base), "--output", str(output)]) == 0
    page, markdown = Page(output.read_text()), output.with_suffix(".md").read_text()
    assert not [tag for tag, _ in page.tags if tag in ("script", "link", "img", "iframe", "object", "base", "form")]
    references = [value for _, attrs in page.tags for name, value in attrs.items() if name in ("src", "href", "action")]
    assert not references and "url(" not in output.read_text() and "@import" not in output.read_text()
    for text in ("0.500 (0.150 to 0.850)", "0.250 (0.125 to 0.375)", "acc 0.625 (0.429 to 0.821)", "failed", "1,024"):
        assert text in page.texts and text in markdown
    assert "a < b" in page.texts
    assert any(text.endswith(" (1.125 to 9.875)") for text in page.texts)


def test_a_folder_of_checkpoints_names_its_run_and_a_page_without_a_suffix_gets_one(base: Path, tmp_path: Path) -> None:
    (folder,) = base.glob("*_checkpoints/reported")
    assert main(["report", str(folder), "--output", str(tmp_path / "page")]) == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["page.html", "page.md"]
    assert (tmp_path / "page.md").read_text() == markdown_page([read_run(f"{base}/reported")])


@pytest.mark.parametrize(("names", "message"), [(["nothing"], "no run nothing"), ([], "runs")])
def test_an_unknown_run_is_reported(
    names: list[str], message: str, base: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LMCHAT_BASE_DIR", str(base))
    assert main(["report", *names]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error


@pytest.mark.parametrize("name", ["run.json", "intervals.jsonl", "samples.jsonl"])
@pytest.mark.parametrize("content", ["[" * 5000, "[]", "{", "\x00"])
def test_a_damaged_record_is_reported(
    base: Path, tmp_path: Path, content: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(base / "logs", tmp_path / "logs")
    record = tmp_path / "logs" / "pretrain" / "reported" / "version_0" / name
    record.write_text(content)
    assert main(["report", str(tmp_path)]) == 2
    assert str(record) in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("run.json", '{"versions": [1]}'),
        ("run.json", "\xff"),
        ("intervals.jsonl", '{"step": "1", "intervals": {}}'),
        ("samples.jsonl", '{"samples": 7}'),
        ("csv/metrics.csv", "train/loss\n1\n"),
        ("csv/metrics.csv", "step,train/loss\n1e999,1\n"),
        ("csv/metrics.csv", "step,train/loss\n-1,2\n"),
    ],
)
def test_wrong_values_are_reported(
    name: str, content: str, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(base / "logs", tmp_path / "logs")
    record = tmp_path / "logs" / "pretrain" / "reported" / "version_0" / name
    record.write_bytes(content.encode("latin-1"))
    assert main(["report", str(tmp_path)]) == 2
    assert str(record) in capsys.readouterr().err


@pytest.mark.parametrize("result", ['"x"', '{"accuracy": "x"}', '{"interval_95": 7}', '{"interval_95": [0.1]}'])
def test_wrong_results_of_evaluations_are_refused(result: str, tmp_path: Path) -> None:
    path = tmp_path / "eval_000020.json"
    path.write_text(f'{{"ARC-Easy": {result}}}')
    with pytest.raises(UserError, match=r"eval_000020\.json is not a results file"):
        read_results(path)


def test_metrics_without_finite_values_have_no_chart(base: Path, tmp_path: Path) -> None:
    shutil.copytree(base / "logs", tmp_path / "logs")
    version = tmp_path / "logs" / "pretrain" / "reported" / "version_0"
    rows = "".join(f"{step},nan,1,64,0.5\n{step},inf,1,64,0.5\n" for step in range(1, 4))
    (version / "csv" / "metrics.csv").write_text("step,train/loss_ema,train/step_ms,train/tokens,val/bpb\n" + rows)
    (version / "config.yaml").write_bytes(b"\xff")
    assert main(["report", str(tmp_path), "--output", str(tmp_path / "report.html")]) == 0


def hostile_run(name: str) -> Run:
    records = {
        step: {"train/loss_ema": 1.0 / step, "val/<b>x": float(step), "train/step_ms": 1.0} for step in (1, 2, 3)
    }
    start: dict[str, Any] = {"command": "lmchat fit --x '</pre><script>alert(1)</script>'", "versions": {"<i>": "1"}}
    stage = StageRun("sft", records, [start], "a: </pre><img src=x>", {"</td><script>": "| a |\n"})
    return Run(name, {"sft": stage})


def test_contents_of_runs_are_escaped() -> None:
    name = '<script>alert("x")</script>'
    page = Page(html_page([hostile_run(name), hostile_run("b & c")]))
    assert not {"script", "img", "b", "i"} & {tag for tag, _ in page.tags}
    assert f"{name}, b & c" in page.texts
    table = [line for line in markdown_page([hostile_run("a|b")]).splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table[:3]}) == 1


@given(st.floats(-1e12, 1e12), st.floats(0, 1e12), st.integers(2, 8))
def test_ticks_are_round_and_cover_the_range(low: float, span: float, count: int) -> None:
    marks = ticks(low, low + span, count)
    step = marks[1] - marks[0]
    slack = 1e-6 * max(abs(low), abs(low + span), step)
    assert marks[0] <= low + slack and marks[-1] >= low + span - slack
    assert 2 <= len(marks) <= count + 3
    mantissa = step / 10 ** np.floor(np.log10(step) + 1e-9)
    assert min(abs(mantissa - factor) for factor in (1, 2, 5, 10)) < 1e-3 or span < 1e-3 * abs(low)  # else rounded away


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0"), (0.25, "0.25"), (1234, "1234"), (25_000, "25k"), (3.2e6, "3.2M"), (4e18, "4e+18")]
)
def test_numbers_are_short(value: float, text: str) -> None:
    assert number(value) == text


def test_long_lines_are_averaged_to_few_points() -> None:
    x = np.linspace(1, 10_000, 10_000)
    y = np.sin(x / 2000)
    y[5000] = np.nan
    svg = ET.fromstring(line_chart({"a": (x, y), "none": (x[:0], y[:0])}, "steps", "sine & more"))
    (line,) = svg.findall("polyline")
    points = np.array([[float(value) for value in pair.split(",")] for pair in line.attrib["points"].split()])
    assert len(points) == MAX_POINTS
    heights = -points[:, 1]
    expected = np.sin(np.linspace(1, 10_000, MAX_POINTS) / 2000)
    assert np.corrcoef(heights, expected)[0, 1] > 0.999


@pytest.mark.xdist_group("browser")
@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser(browser: Any, base: Path, tmp_path: Path, width: int, scheme: str) -> None:  # noqa: F811
    (tmp_path / "report.html").write_text(html_page([read_run(str(base)), hostile_run("other")]))
    page = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme).new_page()
    requests: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(f"file://{tmp_path}/report.html")
    assert len(requests) == 1
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    for axis in AXES:
        page.check(f"#x-{axis}")
        shown = page.evaluate(
            "[...document.querySelectorAll('.x')].filter(each => each.offsetParent).map(each => each.className)"
        )
        assert shown and set(shown) == {f"x x-{axis}"}
    overlaps = """[...document.querySelectorAll('svg')].filter(svg => svg.getClientRects().length).some(svg => {
        const boxes = [...svg.querySelectorAll('text')].map(text => text.getBoundingClientRect())
        return boxes.some((a, i) => boxes.some((b, j) => i < j && a.left < b.right && b.left < a.right
            && a.top < b.bottom - 1 && b.top < a.bottom - 1))
    })"""
    assert not page.evaluate(overlaps)
    background = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert background == {"light": "rgb(255, 255, 255)", "dark": "rgb(13, 17, 23)"}[scheme]
    page.context.close()


def test_a_task_of_core_is_shown_once() -> None:
    records = {4: {"val/core": 0.2, "val/core/copa": 0.1, "val/core/piqa": 0.3}}
    result = {"copa": {"accuracy": 0.55, "interval_95": [0.5, 0.6]}}
    stage = StageRun("pretrain", records, results=result, intervals={4: {"val/core": [0.1, 0.3]}})
    rows = dict(final_metrics([Run("a", {"pretrain": stage})]).rows)  # type: ignore[arg-type]
    assert rows == {"CORE": "0.200 (0.100 to 0.300)", "core/piqa": "0.3", "copa, evaluated": "0.550 (0.500 to 0.600)"}
