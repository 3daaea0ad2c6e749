"""``lmchat data``: shards of text from the hub or any folder, their tokens; conversations as they are trained on."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lmchat.paths import base_data_dir, tokenizer_dir
from lmchat.types import UserError

if TYPE_CHECKING:
    from rich.text import Text

    from lmchat.data.conversations import RenderedConversations
    from lmchat.data.mixture import Mixture
    from lmchat.tokenizer.bpe import Tokenizer


def download(
    num_shards: int = 8,
    repo_id: str = "karpathy/fineweb-edu-100b-shuffle",
    output: Path | None = None,
    revision: str = "main",
    pattern: str = "*.parquet",
    num_workers: int = 8,
) -> None:
    """Fetch pretraining shards from the Hugging Face hub; run again to continue or to fetch more.

    Args:
        num_shards: training shards to fetch, of about 250 million characters each; -1 is all. The last shard of the
            repository always comes too, for validation.
        repo_id: data set on the hub, for example karpathy/climbmix-400b-shuffle. HF_ENDPOINT names another hub.
        output: folder of the shards; default is $LMCHAT_BASE_DIR/base_data.
        revision: branch, tag or commit of the repository.
        pattern: which files of the repository are shards, for example "sample/10BT/*.parquet".
        num_workers: simultaneous transfers.
    """
    from lmchat.data.download import download_shards

    report = download_shards(
        repo_id,
        output or base_data_dir(),
        num_shards=num_shards,
        revision=revision,
        pattern=pattern,
        num_workers=num_workers,
    )
    print(
        f"{report.shards} shards ({report.size / 1e9:.2f} GB) in {report.directory}, "
        f"{report.shards - report.present} of them fetched now; the last is for validation"
    )


def import_(
    source: Path,
    output: Path | None = None,
    text_field: str = "text",
    separator: str | None = None,
    validation_fraction: float = 0.01,
    shard_characters: int = 250_000_000,
    seed: int = 0,
) -> None:
    """Make shards from the .txt, .md, .rst, .jsonl, .jsonl.gz and .parquet files under a folder.

    Documents are shuffled, and exact duplicates dropped.

    Args:
        source: folder, or one file.
        output: folder to make; default is $LMCHAT_BASE_DIR/base_data.
        text_field: field of JSON lines and column of parquet files that holds the text.
        separator: string that divides plain text files into documents; by default a file is a document.
        validation_fraction: share of the documents that go to the last shard, for validation.
        shard_characters: characters that make a shard full.
        seed: seed of the shuffle.
    """
    from lmchat.data.importing import import_folder

    output = output or base_data_dir()
    report = import_folder(
        source,
        output,
        text_field=text_field,
        separator=separator,
        validation_fraction=validation_fraction,
        shard_characters=shard_characters,
        seed=seed,
    )
    shards = report.shards
    print(
        f"{shards.train_documents:,} documents for training in {shards.train_shards} shards and "
        f"{shards.validation_documents:,} for validation in one, {shards.characters:,} characters, in {output}"
    )
    print(
        f"left out: {shards.duplicates:,} duplicates, {shards.blank:,} blank documents, {report.other_files:,} "
        f"files of other kinds, {len(report.undecodable):,} files that are not UTF-8 text"
    )
    for path in report.undecodable[:10]:
        print(f"  not UTF-8 text: {path}")


def tokenize(data_dir: Path | None = None, tokenizer: Path | None = None, num_threads: int | None = None) -> None:
    """Tokenize shards ahead of training, which otherwise does it when it starts.

    Args:
        data_dir: folder of the shards; default is $LMCHAT_BASE_DIR/base_data.
        tokenizer: folder of the tokenizer; default is $LMCHAT_BASE_DIR/tokenizer.
        num_threads: default is one per core.
    """
    from lmchat.data.token_shards import prepare_token_shards
    from lmchat.tokenizer.bpe import Tokenizer

    report = prepare_token_shards(
        data_dir or base_data_dir(), Tokenizer.load(tokenizer or tokenizer_dir()), num_threads=num_threads
    )
    print(
        f"{report.tokens:,} tokens of {report.documents:,} documents in {report.directory}; "
        f"{report.made} of {report.shards} shards tokenized now, {report.skipped:,} empty documents skipped"
    )


def words(data_dir: Path | None = None, max_shards: int | None = None, output: Path | None = None) -> None:
    """Make the word list of the spelling tasks from the words of the training shards.

    Args:
        data_dir: folder of parquet shards; default is $LMCHAT_BASE_DIR/base_data.
        max_shards: read this many at most, the first by name: the same ones while others are downloaded.
        output: file to write; default is $LMCHAT_BASE_DIR/words.txt.
    """
    from lmchat.data.parquet_text import list_shards, read_documents
    from lmchat.tasks.words import words_from_text, write_words

    if max_shards is not None and max_shards < 1:
        raise UserError(f"max_shards is {max_shards}; it must be at least 1")
    *train, _ = list_shards(data_dir or base_data_dir())
    found = words_from_text(text or "" for shard in train[:max_shards] for text in read_documents(shard))
    print(f"{len(found):,} words: {write_words(found, output)}")


def show(
    source: Path,
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
        split: which mixture of the config.
        tokenizer: folder of the tokenizer; default is $LMCHAT_BASE_DIR/tokenizer.
        max_tokens: longest conversation, the sequence length of the model; the rest of a longer one is cut off.
        start: number of the first conversation to show, counted from 0 in the order of the mixture.
        rows: how many to show.
        only: show those alone that are cut short (truncated), or of which nothing is learned (unsupervised).
        limit: render and count this many conversations at most; by default all, as fine-tuning does.
    """
    from rich.console import Console

    from lmchat.data.conversations import RenderedConversations, render_all
    from lmchat.tokenizer.bpe import Tokenizer

    for name, value, least in (("max_tokens", max_tokens, 1), ("start", start, 0), ("rows", rows, 0)):
        if value < least:
            raise UserError(f"--{name} is {value}; it must be at least {least}")
    encoder = Tokenizer.load(tokenizer or tokenizer_dir())
    mixture = _mixture(source, split)
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


COMMANDS = {"download": download, "import": import_, "tokenize": tokenize, "words": words, "show": show}

_CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]")


def _mixture(source: Path, split: str) -> Mixture:
    """A config's mixture, or the conversations of a file in its order."""
    from lmchat.data.mixture import Mixture, MixturePart
    from lmchat.tasks import JSONLConversations

    if source.suffix in (".yaml", ".yml"):
        return _mixture_of_config(source, split)
    return Mixture([MixturePart(JSONLConversations(str(source)))], shuffle_seed=None)


def _mixture_of_config(config: Path, split: str) -> Mixture:
    import yaml  # type: ignore[import-untyped]
    from jsonargparse import ArgumentParser

    from lmchat.data.mixture import Mixture

    try:
        data = yaml.safe_load(config.read_text())["data"]["init_args"]
        options = {"parts": data[split], **{name: data[name] for name in ("shuffle_seed",) if name in data}}
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise UserError(f"cannot read {config}: {error}") from error
    except (KeyError, TypeError) as error:
        raise UserError(f"{config} has no mixture data.init_args.{split}; give one like configs/sft.yaml") from error
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Mixture, "mixture")
    return parser.instantiate(parser.parse_object({"mixture": options})).mixture


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
