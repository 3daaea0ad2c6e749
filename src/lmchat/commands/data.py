"""``lmchat data``: downloads, imports, checks and tokenizes text, makes word lists, shows conversations."""

from pathlib import Path
from typing import Any, Literal

from lmchat.paths import base_data_dir, eval_bundle_dir, tokenizer_dir
from lmchat.types import UserError


def download(
    num_shards: int = 8,
    repo_id: str = "karpathy/fineweb-edu-100b-shuffle",
    output: Path | None = None,
    revision: str = "main",
    pattern: str = "*.parquet",
    num_workers: int = 8,
    eval_bundle: bool = False,
    eval_bundle_url: str = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip",
) -> None:
    """Download pretraining shards from the Hugging Face Hub, or the evaluation bundle of CORE.

    Run it again to continue or to download more shards.

    Args:
        num_shards: number of training shards, of about 250 million characters each; -1 is all. The last shard of the
            repository is always included, for validation.
        repo_id: dataset on the Hub, for example karpathy/climbmix-400b-shuffle. HF_ENDPOINT sets another server.
        output: folder of the shards; default is $LMCHAT_BASE_DIR/base_data.
        revision: branch, tag or commit of the repository.
        pattern: glob pattern of the files that are shards, for example "sample/10BT/*.parquet".
        num_workers: number of parallel transfers.
        eval_bundle: download the evaluation bundle of CORE instead of shards, to $LMCHAT_BASE_DIR/eval_bundle.
        eval_bundle_url: URL of the bundle.
    """
    if eval_bundle:
        from lmchat.evaluation.bundle_download import download_bundle

        folder = output or eval_bundle_dir()
        print(f"{download_bundle(folder, eval_bundle_url)} tasks of CORE in {folder}")
        return

    from lmchat.data.download import download_shards

    print(download_shards(repo_id, output or base_data_dir(), num_shards, revision, pattern, num_workers))


def import_(
    source: Path,
    output: Path | None = None,
    text_field: str = "text",
    separator: str | None = None,
    encoding: str | None = None,
    max_document_characters: int = 10_000_000,
    validation_fraction: float = 0.01,
    shard_characters: int = 250_000_000,
    seed: int = 0,
) -> None:
    r"""Make shards from the text files under a folder.

    Reads .txt .md .rst .tex .html .jsonl .ndjson .json .csv .tsv .warc files and .xml exports of MediaWiki, also
    compressed (.gz .zst .bz2 .xz), and .parquet. Encodings are detected, and reported if not UTF-8. Documents are
    shuffled and exact duplicates dropped. Files and folders that begin with a dot are left out; links are followed.

    Args:
        source: folder or file.
        output: folder to create; default is $LMCHAT_BASE_DIR/base_data.
        text_field: field of JSON records, or column of tables, with the text.
        separator: string that splits plain text files into documents, where \n is a line break, also a Windows one;
            default is one document per file.
        encoding: encoding of files that are not Unicode and do not declare theirs, such as cp1251; default is to
            detect it.
        max_document_characters: longer documents are split at the end of a paragraph, line or word.
        validation_fraction: share of the documents in the last shard, for validation.
        shard_characters: size of a shard in characters.
        seed: seed of the shuffle.
    """
    from lmchat.data.import_text import import_folder

    shards = {"validation_fraction": validation_fraction, "shard_characters": shard_characters, "seed": seed}
    output = output or base_data_dir()
    print(import_folder(source, output, text_field, separator, encoding, max_document_characters, **shards))


def tokenize(data_dir: Path | None = None, tokenizer: Path | None = None, num_threads: int | None = None) -> None:
    """Tokenize shards ahead of training, which otherwise does it at its start.

    Args:
        data_dir: folder of the shards; default is $LMCHAT_BASE_DIR/base_data.
        tokenizer: folder of the tokenizer; default is $LMCHAT_BASE_DIR/tokenizer.
        num_threads: number of threads; default is one per core.
    """
    from lmchat.data.tokenize import prepare_token_shards
    from lmchat.option_checks import check_count
    from lmchat.tokenizer.bpe import Tokenizer

    check_count("", 1, num_threads=num_threads)
    encoder = Tokenizer.load(tokenizer or tokenizer_dir())
    print(prepare_token_shards(data_dir or base_data_dir(), encoder, num_threads=num_threads))


def check(
    data_dir: Path | None = None,
    mixture: Path | None = None,
    tokenizer: Path | None = None,
    evaluation: list[Path] | None = None,
    similarity: float = 0.8,
    sequence_len: int = 2048,
    output: Path | None = None,
) -> None:
    """Report duplicates, overlap with evaluation sets, lengths, and cropped and padded tokens of shards or a mixture.

    Near duplicates are found by MinHash of word 5-grams, overlap by word 13-grams.

    Args:
        data_dir: folder of parquet shards; default is $LMCHAT_BASE_DIR/base_data.
        mixture: check conversations in place of shards: those of a fine-tuning config, e.g. configs/sft.yaml, or of a
            file or folder.
        tokenizer: folder of the tokenizer for --mixture; default is $LMCHAT_BASE_DIR/tokenizer.
        evaluation: file, folder or zip file of evaluation sets (JSON lines, JSON or parquet); may be given several
            times. Default is $LMCHAT_BASE_DIR/eval_bundle, if it exists.
        similarity: Jaccard similarity from which on documents are near duplicates, between 0 and 1.
        sequence_len: sequence length for the shares of tokens that packing crops and pads; of shards only if there are
            token files.
        output: JSON file to write the report to, as well.
    """
    from lmchat.commands.mixtures import mixtures
    from lmchat.data.evaluation_overlap import evaluation_files
    from lmchat.data.health import check_mixtures, check_shards
    from lmchat.data.health_tables import print_health, write_health
    from lmchat.option_checks import check_count
    from lmchat.tokenizer.bpe import Tokenizer

    check_count("", 1, sequence_len=sequence_len)
    if not 0 <= similarity <= 1:
        raise UserError(f"--similarity is {similarity}; it must be a number from 0 to 1")
    folders = evaluation or [folder for folder in [eval_bundle_dir()] if folder.exists()]
    files = [file for folder in folders for file in evaluation_files(folder)]
    options: Any = {"similarity": similarity, "sequence_len": sequence_len}
    if mixture is None:
        health = check_shards(data_dir or base_data_dir(), files, **options)
    elif data_dir is None:
        health = check_mixtures(mixtures(mixture, []), Tokenizer.load(tokenizer or tokenizer_dir()), files, **options)
    else:
        raise UserError(f"--data_dir {data_dir} and --mixture {mixture} exclude each other; give one of them")
    print_health(health)
    if output:
        write_health(health, output)


def words(data_dir: Path | None = None, max_shards: int | None = None, output: Path | None = None) -> None:
    """Make the word list of the spelling tasks from the words of the training shards.

    Args:
        data_dir: folder of parquet shards; default is $LMCHAT_BASE_DIR/base_data.
        max_shards: maximum number of shards to read, in order of their names.
        output: file to write; default is $LMCHAT_BASE_DIR/words.txt.
    """
    from lmchat.data.parquet_text import list_shards, read_documents
    from lmchat.option_checks import check_count
    from lmchat.tasks.words import words_from_text, write_words

    check_count("", 1, max_shards=max_shards)
    *train, _ = list_shards(data_dir or base_data_dir())
    found = words_from_text(text or "" for shard in train[:max_shards] for text in read_documents(shard))
    print(f"{len(found):,} words: {write_words(found, output)}")


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
    show_conversations(mixture, encoder, max_tokens, start, rows, only, limit)


COMMANDS = {
    "download": download,
    "import": import_,
    "check": check,
    "tokenize": tokenize,
    "words": words,
    "show": show,
}
SHORT_OPTIONS = {"--overlay": "--overlay+", "--evaluation": "--evaluation+"}
"""jsonargparse appends to a list with a plus."""
