"""Makes the README's pictures from a finished demo: the training curves and the closing conversation.

    make demo && .venv/bin/python docs/make_readme_pictures.py runs/demo

Writes docs/images/curves.png and docs/images/chat.svg. The conversation takes place again; decoding is greedy, so it is
the one that the demo printed.
"""

from __future__ import annotations

import contextlib
import io
import shutil
import sys
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

from lmchat.demo.conversation import converse
from lmchat.demo.report import draw_curves
from lmchat.demo.run import Demo

IMAGES = Path(__file__).resolve().parent / "images"
WIDTH = 100
SVG = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="monospace">
<style>.{unique_id}-matrix {{ font-size: {char_height}px; line-height: {line_height}px }} {styles}</style>
<defs><clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}" /></clipPath>{lines}</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}<g class="{unique_id}-matrix">{matrix}</g></g></svg>
"""
"""Rich's picture of a terminal without its web font: the picture loads nothing from the network."""


def main(folder: Path) -> None:
    """Writes both pictures of the demo in ``folder``."""
    run = Demo(folder, None, 15)
    IMAGES.mkdir(exist_ok=True)
    draw_curves(run)
    shutil.copy(folder / "curves.png", IMAGES / "curves.png")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        converse(run)
    console = Console(record=True, width=WIDTH, file=io.StringIO())
    for line in printed.getvalue().strip().splitlines():
        style = "bold cyan" if line.startswith("> ") else "green" if line == "✓" else "red" if line == "✗" else ""
        console.print(Text(line, style=style))
    title = "lmchat demo: closing conversation"
    console.save_svg(str(IMAGES / "chat.svg"), title=title, theme=MONOKAI, code_format=SVG)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: make_readme_pictures.py DEMO_FOLDER")
    main(Path(sys.argv[1]))
