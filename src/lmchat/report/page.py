"""Writes a report as an HTML page without scripts and external resources, and as Markdown."""

from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template

from lmchat.files import replacing
from lmchat.report.charts import line_chart, series_class
from lmchat.report.runs import AXES, Run, StageRun
from lmchat.report.summary import (
    TITLES,
    Table,
    charted_metrics,
    columns,
    commands,
    effort,
    final_metrics,
    label,
    origin,
)

ORIGINS, EFFORT, FINAL = "Origin", "Training", "Final metrics"
NO_COMMANDS = "The commands were not recorded: the run is older than lmchat's run.json."


def write_report(runs: Sequence[Run], path: Path) -> None:
    """Writes the HTML page to ``path`` and the Markdown beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for target, text in ((path, html_page(runs)), (path.with_suffix(".md"), markdown_page(runs))):
        with replacing(target) as unfinished:
            unfinished.write_text(text)


def html_page(runs: Sequence[Run]) -> str:
    """HTML report of runs; charts overlay their curves."""
    names = [run.name for run in runs]
    parts = [f"<h1>{escape(', '.join(names))}</h1>", "<p>Report of training runs with lmchat</p>"]
    parts += [f"<h2>{FINAL}</h2>", _html_table(final_metrics(runs)), f"<h2>{EFFORT}</h2>", _html_table(effort(runs))]
    parts += ["<h2>Curves</h2>", _axis_choice()]
    if len(runs) > 1:
        parts.append(_legend(names))
    parts += [_charts(runs, stage) for stage in TITLES if any(stage in run.stages for run in runs)]
    parts += ["<h2>Samples</h2>", *(_html_samples(heading, stage) for heading, stage in columns(runs))]
    parts.append(f"<h2>{ORIGINS}</h2>")
    for heading, stage in columns(runs):
        parts += [f"<h3>{escape(heading)}</h3>", _html_table(origin(stage))]
        if stage.config:
            parts.append(f"<details><summary>config.yaml</summary><pre>{escape(stage.config)}</pre></details>")
    parts.append("<h2>Reproduce</h2>")
    parts += [f"<h3>{escape(run.name)}</h3><pre>{escape(commands(run) or NO_COMMANDS)}</pre>" for run in runs]
    rules = "\n".join(f"body:has(#x-{axis}:checked) .x-{axis} {{ display: block; }}" for axis in AXES)
    template = Template(resources.files(__package__).joinpath("page.html").read_text())
    return template.substitute(title=escape(", ".join(names)), axis_rules=rules, body="\n".join(parts))


def markdown_page(runs: Sequence[Run]) -> str:
    """Markdown report, without curves."""
    parts = [f"# {', '.join(run.name for run in runs)}", f"## {FINAL}", _markdown_table(final_metrics(runs))]
    parts += [f"## {EFFORT}", _markdown_table(effort(runs)), f"## {ORIGINS}"]
    for heading, stage in columns(runs):
        facts = "\n".join(f"- {name}: {value}" for name, value in origin(stage).rows)
        parts += [f"### {heading}", facts]
    parts.append("## Reproduce")
    parts += [f"```bash\n{commands(run)}\n```" if commands(run) else NO_COMMANDS for run in runs]
    return "\n\n".join(parts) + "\n"


def _charts(runs: Sequence[Run], stage: str) -> str:
    stages = {run.name: run.stages[stage] for run in runs if stage in run.stages}
    figures = []
    for metric in charted_metrics(list(stages.values())):
        charts = []
        for axis, x_label in AXES.items():
            series = {run.name: run.stages.get(stage, StageRun(stage)).curve(metric, axis) for run in runs}
            known = any(len(x) for x, _ in series.values())
            chart = line_chart(series, x_label, label(metric)) if known else f"<p>{x_label} are not known</p>"
            charts.append(f'<div class="x x-{axis}">{chart}</div>')
        figures.append(f"<figure><h3>{escape(label(metric))}</h3>{''.join(charts)}</figure>")
    return f'<h3>{TITLES[stage]}</h3><div class="grid-of-charts">{"".join(figures)}</div>'


def _axis_choice() -> str:
    choices = "".join(
        f'<label><input type="radio" name="x" id="x-{axis}"{" checked" if axis == "step" else ""}> {text}</label>'
        for axis, text in AXES.items()
    )
    return f"<fieldset><legend>against</legend>{choices}</fieldset>"


def _legend(names: Sequence[str]) -> str:
    items = "".join(
        f'<li><svg viewBox="0 0 26 10" aria-hidden="true"><polyline points="0,5 26,5" '
        f'class="{series_class(index)}"/></svg>{escape(name)}</li>'
        for index, name in enumerate(names)
    )
    return f'<ul class="legend">{items}</ul>'


def _html_samples(heading: str, stage: StageRun) -> str:
    if not stage.samples:
        return ""
    rows = [[prompt, text] for prompt, text in stage.samples.items()]
    return f"<h3>{escape(heading)}</h3>{_html_table(Table(['prompt', 'completion'], rows))}"


def _html_table(table: Table) -> str:
    def cells(tag: str, texts: Sequence[str], scope: str = "") -> str:
        kinds = ("", *[' class="number"' if table.numeric else ""] * (len(texts) - 1))
        return "".join(f"<{tag}{scope}{kind}>{escape(text)}</{tag}>" for kind, text in zip(kinds, texts, strict=False))

    head = cells("th", table.header, ' scope="col"')
    rows = "".join(f"<tr>{cells('td', row)}</tr>" for row in table.rows)
    return f'<div class="scroll"><table><thead>{head}</thead><tbody>{rows}</tbody></table></div>'


def _markdown_table(table: Table) -> str:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rule = ["---", *["---:" if table.numeric else "---"] * (len(table.header) - 1)]
    return "\n".join([line(table.header), line(rule), *map(line, table.rows)])
