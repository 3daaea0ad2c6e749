"""Makes the README's pictures from a finished demo: the training curves and the closing conversation.

    make demo && .venv/bin/python docs/make_readme_pictures.py runs/demo

Writes docs/images/curves.svg and docs/images/chat.svg. The conversation takes place again; decoding is greedy, so it is
the one that the demo printed.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Mapping
from html import escape
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

from lmchat.demo.conversation import converse
from lmchat.demo.run import Demo
from lmchat.report.charts import HEIGHT, WIDTH, line_chart
from lmchat.report.runs import Points, read_run

IMAGES = Path(__file__).resolve().parent / "images"
COLUMNS = 100
SVG = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="monospace">
<style>.{unique_id}-matrix {{ font-size: {char_height}px; line-height: {line_height}px }} {styles}</style>
<defs><clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}" /></clipPath>{lines}</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}<g class="{unique_id}-matrix">{matrix}</g></g></svg>
"""
"""Rich's picture of a terminal without its web font: the picture loads nothing from the network."""
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #57606a } .title { font-size: 15px; fill: #1c2128 }
.page { fill: #fff } .grid { stroke: #d0d7de } polyline { fill: none; stroke-width: 1.8 }
.series0 { stroke: #0969da } .series1 { stroke: #bc4c00 } .name0 { fill: #0969da } .name1 { fill: #bc4c00 }
@media (prefers-color-scheme: dark) { .page { fill: #0d1117 } .title { fill: #e6edf3 } .grid { stroke: #30363d }
text { fill: #9198a1 } .series0 { stroke: #58a6ff } .series1 { stroke: #f0883e }
.name0 { fill: #58a6ff } .name1 { fill: #f0883e } }
"""
TOP = 36
REWARD_STEPS = 10
"""Steps that each point of the reward's curve is the mean of."""


def main(folder: Path) -> None:
    """Writes both pictures of the demo in ``folder``."""
    run = Demo(folder, None, 15)
    IMAGES.mkdir(exist_ok=True)
    (IMAGES / "curves.svg").write_text(curves(folder))
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        converse(run)
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    for line in printed.getvalue().strip().splitlines():
        style = "bold cyan" if line.startswith("> ") else "green" if line == "✓" else "red" if line == "✗" else ""
        console.print(Text(line, style=style))
    title = "lmchat demo: closing conversation"
    console.save_svg(str(IMAGES / "chat.svg"), title=title, theme=MONOKAI, code_format=SVG)


def curves(folder: Path) -> str:
    """An SVG image with a chart of each stage."""
    stages = read_run(str(folder)).stages
    steps, rewards = stages["rl"].curve("train/pass@1", "step")
    means = np.convolve(rewards, np.full(REWARD_STEPS, 1 / REWARD_STEPS), "valid")
    charts: list[tuple[str, Mapping[str, Points]]] = [
        ("Pretraining: bits per byte", {"held-out text": stages["pretrain"].curve("val/bpb", "step")}),
        ("Fine-tuning: loss, nats", {"training": stages["sft"].curve("train/loss_ema", "step")}),
        (
            "RL on problems: accuracy",
            {
                "training": (steps[REWARD_STEPS - 1 :], means),
                "held-out problems": stages["rl"].curve("val/pass@1", "step"),
            },
        ),
    ]
    parts = []
    for index, (title, series) in enumerate(charts):
        chart = line_chart(series, "optimizer steps", title)
        parts.append(
            chart.replace("<svg ", f'<svg x="{index * WIDTH}" y="{TOP}" width="{WIDTH}" height="{HEIGHT}" ', 1)
        )
        names = " ".join(
            f'<tspan class="name{number}" dx="12">{escape(name)}</tspan>' for number, name in enumerate(series)
        )
        parts.append(f'<text x="{index * WIDTH + 58}" y="24"><tspan class="title">{title}</tspan>{names}</text>')
    size = f"{WIDTH * len(charts)} {HEIGHT + TOP}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}"><style>{STYLE}</style>'
        f'<rect class="page" width="100%" height="100%"/>{"".join(parts)}</svg>\n'
    )


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: make_readme_pictures.py DEMO_FOLDER")
    main(Path(sys.argv[1]))
