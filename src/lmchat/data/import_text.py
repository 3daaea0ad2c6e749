"""Imports a folder of text into shuffled, deduplicated parquet shards."""

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lmchat.data.documents import MAX_DOCUMENT_CHARACTERS, DocumentReader, parse_separator, text_files
from lmchat.data.encodings import browser_encoding
from lmchat.data.parquet_text import TEXT_COLUMN
from lmchat.data.shard_writer import WrittenShards, write_shards
from lmchat.option_checks import check_count
from lmchat.progress import ProgressBar
from lmchat.records import FoundFiles
from lmchat.types import UserError

_LISTED = 10


@dataclass
class ImportReport:
    """Result of `import_folder`: shards written to ``output``, files found, and statistics of the documents."""

    output: Path
    shards: WrittenShards
    found: FoundFiles
    reader: DocumentReader

    def __str__(self) -> str:
        shards, found, reader = self.shards, self.found, self.reader
        lines = [
            f"{shards.train_documents:,} documents for training in {shards.train_shards} shards and "
            f"{shards.validation_documents:,} for validation in one, {shards.characters:,} characters, in "
            f"{self.output}",
            f"left out: {shards.duplicates:,} duplicates, {shards.blank:,} blank documents, "
            f"{found.others.total():,} files of other kinds{f' ({found.other_kinds()})' if found.others else ''}, "
            f"{found.hidden:,} hidden files and folders",
        ]
        lines += [f"  {count:,} {reason}" for reason, count in reader.left_out_pages.items()]
        left_out = {**reader.left_out, "a link that points nowhere": list(map(str, found.broken_links))}
        for reason, places in left_out.items():
            lines += [f"  {reason}: {place}" for place in places[:_LISTED]]
            lines += [f"  ... and {len(places) - _LISTED:,} more"] if len(places) > _LISTED else []
        for encoding, files in reader.recoded.items():
            detected = "" if encoding.startswith("UTF") or reader.encoding else "; --encoding names another"
            lines.append(f"read as {encoding}: {len(files):,} files, such as {files[0]}{detected}")
        if reader.divided:
            lines.append(
                f"divided: {reader.divided:,} documents longer than {reader.max_characters:,} characters "
                "(--max_document_characters)"
            )
        if reader.separator is not None and reader.divided_files < reader.plain_files:
            lines.append(f"without the separator: {reader.plain_files - reader.divided_files:,} plain text files")
        return "\n".join(lines)


def import_folder(
    source: Path,
    output: Path,
    text_field: str = TEXT_COLUMN,
    separator: str | None = None,
    encoding: str | None = None,
    max_document_characters: int = MAX_DOCUMENT_CHARACTERS,
    **shards: Any,
) -> ImportReport:
    """Writes parquet shards from all text files under a folder; see `lmchat.data.documents` for the kinds.

    A plain text file is one document, or several with a ``separator``. Memory stays below 1 GB. The options are
    those of `DocumentReader` and `write_shards`.

    Raises:
        UserError: there is nothing to import, a line or file is malformed, the separator occurs nowhere, or ``output``
            is not empty.
    """
    if Path(os.path.realpath(output)).is_relative_to(os.path.realpath(source)):  # resolve() raises for a loop of links
        raise UserError(f"the output folder {output} is inside the source {source}; choose one outside it")
    check_count("", 1, max_document_characters=max_document_characters)
    if encoding is not None and browser_encoding(encoding) is None:
        raise UserError(
            f"--encoding is {encoding}, which Python does not know; use one such as cp1251, koi8-r or gb18030"
        )
    pattern = parse_separator(separator)
    found = text_files(source)
    size = sum(path.stat().st_size for path in found.files)
    with ProgressBar("Reading text", size, unit="B") as bar:
        reader = DocumentReader(text_field, pattern, encoding, max_document_characters, bar)
        try:
            written = write_shards(_documents(reader, found.files, separator), output, **shards)
        except UserError as error:
            left_out = "; ".join(
                f"{len(places)} {reason}, such as {places[0]}" for reason, places in reader.left_out.items() if places
            )
            raise UserError(f"{error} (left out: {left_out})" if left_out else str(error)) from error
    return ImportReport(output, written, found, reader)


def _documents(reader: DocumentReader, files: Iterable[Path], separator: str | None) -> Iterator[str]:
    for path in files:
        yield from reader.read(path)
    reader.bar.set(reader.bar.total, "Sorting and writing shards")
    if separator is not None and reader.plain_files and not reader.divided_files:
        raise UserError(
            f"--separator {separator!r} occurs in none of the {reader.plain_files} plain text files; write it as it is "
            r"in the files, with \n for a line break, or leave it out to take each file as one document"
        )
