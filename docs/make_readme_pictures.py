"""Draws the README's pictures from a finished demo: the training curves and the final conversation.

    make demo && .venv/bin/python docs/make_readme_pictures.py runs/demo

Writes docs/images/curves.png and docs/images/chat.svg. The conversation is repeated with greedy decoding, so it is the
one that the demo printed.
"""

from __future__ import annotations

import contextlib
import io
import sys
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

from lmchat.demo.conversation import converse
from lmchat.demo.run import Demo
from lmchat.report.runs import read_run

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
REWARD_STEPS = 10
"""Steps that each point of the reward's curve is the mean of."""


def main(folder: Path) -> None:
    """Writes both pictures of the demo in ``folder``."""
    run = Demo(folder, None, 15)
    IMAGES.mkdir(exist_ok=True)
    draw_curves(folder)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        converse(run)
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    for line in printed.getvalue().strip().splitlines():
        style = "bold cyan" if line.startswith("> ") else "green" if line == "✓" else "red" if line == "✗" else ""
        console.print(Text(line, style=style))
    title = "lmchat demo: closing conversation"
    console.save_svg(str(IMAGES / "chat.svg"), title=title, theme=MONOKAI, code_format=SVG)


def draw_curves(folder: Path) -> None:
    """Draws held-out bits per byte, fine-tuning loss, and accuracy in RL by optimizer step."""
    stages = read_run(str(folder)).stages
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    pretrain, sft, rl = figure.subplots(1, 3)
    pretrain.plot(*stages["pretrain"].curve("val/bpb", "step"), label="held-out text", marker="o")
    _titles(pretrain, "Pretraining", "bits per byte")
    sft.plot(*stages["sft"].curve("train/loss_ema", "step"), label="training", linewidth=1)
    _titles(sft, "Fine-tuning", "loss on assistant tokens, nats")
    sft.set_yscale("log")
    steps, rewards = stages["rl"].curve("train/pass@1", "step")
    means = np.convolve(rewards, np.full(REWARD_STEPS, 1 / REWARD_STEPS), "valid")
    rl.plot(steps[REWARD_STEPS - 1 :], means, label=f"training, {REWARD_STEPS}-step mean")
    rl.plot(*stages["rl"].curve("val/pass@1", "step"), label="held-out problems", marker="o")
    _titles(rl, "Reinforcement learning", "accuracy")
    figure.savefig(IMAGES / "curves.png", dpi=120)


def _titles(axes: Axes, title: str, quantity: str) -> None:
    axes.set_title(title)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel(quantity)
    axes.grid(alpha=0.3)
    axes.legend()


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: make_readme_pictures.py DEMO_FOLDER")
    main(Path(sys.argv[1]))
