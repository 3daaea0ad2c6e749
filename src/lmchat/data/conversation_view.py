"""Prints rendered conversations, marking the tokens that receive loss."""

from __future__ import annotations

import re
import tempfile
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from lmchat.data.mixture import Mixture
from lmchat.data.padded_batches import PaddedPlan
from lmchat.data.rendered_conversations import render_all
from lmchat.tokenizer.bpe import Tokenizer

if TYPE_CHECKING:
    from rich.text import Text

_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")


def show_conversations(
    mixture: Mixture, tokenizer: Tokenizer, max_tokens: int, start: int, rows: int, only: str | None, limit: int | None
) -> None:
    """Prints conversations of a mixture, then counts all of them; the options are those of ``lmchat data show``."""
    from rich.console import Console

    chosen = mixture if limit is None else [mixture[index] for index in range(min(limit, len(mixture)))]
    console = Console(highlight=False, markup=False, soft_wrap=True)
    with tempfile.TemporaryDirectory() as folder:
        rendered = render_all(chosen, tokenizer, max_tokens, Path(folder), title="Rendering")
        plan = PaddedPlan(rendered, max_tokens, rows_per_step=1)
        wanted = np.ones(len(rendered), bool)
        if only is not None:
            wanted = rendered.cut_tokens > 0 if only == "truncated" else rendered.loss_tokens == 0
        for index in (start + wanted[start:].nonzero()[0])[:rows].tolist():
            ids, mask = (array.tolist() for array in rendered[index])
            cut = ", truncated" if rendered.cut_tokens[index] else ""
            name = mixture.parts[mixture.locate(index)[0]].task.name
            console.print(f"conversation {index}, {name}: {len(ids)} tokens, {sum(mask)} with loss{cut}", style="bold")
            console.print(marked_tokens(tokenizer, ids, mask))
    for name, count in mixture.counts().items():
        console.print(f"{name}: {count:,} conversations")
    for note in mixture.notes():
        console.print(note)
    console.print(str(rendered))
    console.print(
        f"packed into rows of {max_tokens:,} tokens: {plan.num_rows:,} rows, {plan.padded_share():.1%} padding, "
        f"{plan.masked_rows():,} rows without loss"
    )


def marked_tokens(tokenizer: Tokenizer, ids: list[int], mask: list[bool]) -> Text:
    """Text of a conversation; tokens with loss are green, on separate lines that begin with +."""
    from rich.text import Text

    text = Text()
    for learned, run in groupby(zip(ids, mask, strict=True), key=lambda pair: pair[1]):
        margin = "+ " if learned else "  "
        text.append(margin)
        for special, tokens in groupby((token for token, _ in run), key=lambda token: token >= tokenizer.bos_id):
            style = "magenta" if special else "green" if learned else "dim"
            visible = _CONTROL.sub(lambda match: repr(match[0])[1:-1], tokenizer.decode(list(tokens)))
            text.append(visible.replace("\n", f"⏎\n{margin}"), style=style)
        text.append("\n")
    return text
