"""``lmchat data show``: conversations as fine-tuning sees them."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lmchat.paths import tokenizer_dir
from lmchat.types import UserError

if TYPE_CHECKING:
    from rich.text import Text

    from lmchat.data.mixture import Mixture
    from lmchat.data.rendered import RenderedConversations
    from lmchat.tokenizer.bpe import Tokenizer

_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")


def show(
    source: Path,
    overlay: list[Path] | None = None,
    split: Literal["train", "val"] = "train",
    tokenizer: Path | None = None,
    max_tokens: int = 2048,
    start: int = 0,
    rows: int = 3,
    only: Literal["truncated", "unsupervised"] | None = None,
    limit: int | None = None,
) -> None:
    """Show conversations as fine-tuning sees them, and count them.

    Lines that begin with + are learned (green in a terminal), the others are only read. Special tokens are magenta.

    Args:
        source: a fine-tuning config, whose mixture is shown, e.g. configs/sft.yaml; or conversations in a .jsonl,
            .jsonl.gz or .parquet file or a folder of them.
        overlay: config to lay over that one, as with a further --config of lmchat fit; may be given several times.
        split: which mixture of the config.
        tokenizer: folder of the tokenizer; default is $LMCHAT_BASE_DIR/tokenizer.
        max_tokens: longest conversation, the sequence length of the model; the rest of a longer one is cut off.
        start: number of the first conversation to show, counted from 0 in the order of the mixture.
        rows: how many to show.
        only: show those alone that are cut short (truncated), or of which nothing is learned (unsupervised).
        limit: render and count this many conversations at most; by default all, as fine-tuning does.
    """
    from rich.console import Console

    from lmchat.data.rendered import RenderedConversations, render_all
    from lmchat.tokenizer.bpe import Tokenizer

    options = ("max_tokens", max_tokens, 1), ("start", start, 0), ("rows", rows, 0), ("limit", limit, 1)
    for name, value, least in options:
        if value is not None and value < least:
            raise UserError(f"--{name} is {value}; it must be at least {least}")
    encoder = Tokenizer.load(tokenizer or tokenizer_dir())
    mixture = _mixture(source, overlay or [], split)
    chosen = mixture if limit is None else [mixture[index] for index in range(min(limit, len(mixture)))]
    console = Console(highlight=False, soft_wrap=True)
    with tempfile.TemporaryDirectory() as folder:
        report = render_all(chosen, encoder, max_tokens, Path(folder), title="Rendering")
        rendered = RenderedConversations(Path(folder))
        for index in _matching(rendered, only, start)[:rows]:
            ids, mask = (array.tolist() for array in rendered[index])
            cut = ", truncated" if rendered.truncated[index] else ""
            name = mixture.locate(index)[0].name
            console.print(f"conversation {index}, {name}: {len(ids)} tokens, {sum(mask)} supervised{cut}", style="bold")
            console.print(_row_text(encoder, ids, mask))
    for name, count in mixture.counts().items():
        console.print(f"{name}: {count:,} conversations")
    console.print(str(report))


def _mixture(source: Path, overlay: list[Path], split: str) -> Mixture:
    """A config's mixture, or the conversations of a file in its order."""
    from lmchat.data.mixture import Mixture, MixturePart
    from lmchat.tasks import JSONLConversations

    if source.suffix in (".yaml", ".yml"):
        return _mixture_of_configs([source, *overlay], split)
    if overlay:
        raise UserError(f"--overlay {overlay[0]} goes over a config, and {source} is none; leave it out")
    return Mixture([MixturePart(JSONLConversations(str(source)))], shuffle_seed=None)


def _mixture_of_configs(configs: list[Path], split: str) -> Mixture:
    from lmchat.cli.fit import read_data_module
    from lmchat.stages.chat import ChatDataModule

    data = read_data_module(configs)
    if not isinstance(data, ChatDataModule) or split not in data.mixtures:
        raise UserError(
            f"{', '.join(map(str, configs))}: {type(data).__name__} has no mixture data.init_args.{split}; give a "
            "config like configs/sft.yaml"
        )
    return data.mixtures[split]


def _matching(rendered: RenderedConversations, only: str | None, start: int) -> Sequence[int]:
    """The conversations to choose from, by index."""
    if only is None:
        return range(start, len(rendered))
    wanted = rendered.truncated if only == "truncated" else rendered.supervised == 0
    return [index for index in wanted.nonzero()[0].tolist() if index >= start]


def _row_text(tokenizer: Tokenizer, ids: list[int], mask: list[bool]) -> Text:
    """One run of equal mask after the other, each on lines of its own: legible without colour too."""
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
