"""``lmchat data show``: prints conversations as rendered for fine-tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from lmchat.paths import tokenizer_dir


def show(
    source: Path,
    overlay: list[Path] | None = None,
    split: Literal["train", "val"] = "train",
    tokenizer: Path | None = None,
    max_tokens: int = 2048,
    start: int = 0,
    rows: int = 3,
    only: Literal["truncated", "no_loss_tokens", "unsupervised"] | None = None,
    limit: int | None = None,
) -> None:
    """Show conversations as rendered for fine-tuning, and count them.

    Lines with + receive loss (green in a terminal), others do not. Special tokens are magenta.

    Args:
        source: a fine-tuning config, e.g. configs/sft.yaml; or a file or folder of conversations, as for --data.train
            of configs/sft_own.yaml.
        overlay: config that overrides it, like a further --config of lmchat fit; may be given several times.
        split: mixture of the config.
        tokenizer: folder of the tokenizer; default is $LMCHAT_BASE_DIR/tokenizer.
        max_tokens: length that longer conversations are cut to, e.g. the sequence length of the model.
        start: index of the first conversation to show, counted from 0 in the order of the mixture.
        rows: number of conversations to show.
        only: show only truncated conversations, or only those without loss tokens (no_loss_tokens; formerly
            unsupervised).
        limit: maximum number of conversations to render and count; default is all.
    """
    from lmchat.commands.mixtures import mixtures
    from lmchat.data.conversation_view import show_conversations
    from lmchat.option_checks import check_count
    from lmchat.tokenizer.bpe import Tokenizer

    check_count("", 1, max_tokens=max_tokens, limit=limit)
    check_count("", 0, start=start, rows=rows)
    encoder = Tokenizer.load(tokenizer or tokenizer_dir())
    mixture = mixtures(source, overlay or [], split)[split]
    show_conversations(mixture, encoder, max_tokens=max_tokens, start=start, rows=rows, only=only, limit=limit)
