"""Finds the text files of a folder and reads their documents as a stream."""

import codecs
import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from lmchat.data.encodings import UnknownEncoding, legacy_encoding
from lmchat.data.parquet_text import TEXT_COLUMN, read_documents
from lmchat.data.web_text import HTML_SUFFIXES, WARC_SUFFIXES, decode_page, html_text, warc_texts
from lmchat.data.wiki_text import MAX_PAGE_CHARACTERS, WIKI_SUFFIXES, NotAnExport, WikiPages
from lmchat.progress import ProgressBar
from lmchat.records import (
    COMPRESSION_SUFFIXES,
    JSON_LINES_SUFFIXES,
    JSON_SUFFIXES,
    PARQUET_SUFFIX,
    TABLE_SUFFIXES,
    FoundFiles,
    LongRecord,
    find_files,
    json_values,
    kind_of,
    open_text,
    table_rows,
)
from lmchat.types import UserError, user_errors

PLAIN_SUFFIXES = (".txt", ".text", ".md", ".markdown", ".rst", ".adoc", ".org", ".tex", ".log")
SUFFIXES = (
    *PLAIN_SUFFIXES, *HTML_SUFFIXES, *JSON_LINES_SUFFIXES, *JSON_SUFFIXES, *TABLE_SUFFIXES, *WARC_SUFFIXES,
    *WIKI_SUFFIXES,
)  # fmt: skip
"""Kinds of text files, which may be compressed. Parquet is supported too."""
KINDS = f"{' '.join(SUFFIXES)} .parquet (the text ones also as {' '.join(COMPRESSION_SUFFIXES)})"

MAX_DOCUMENT_CHARACTERS = 10_000_000

NOT_TEXT = "no text in a known encoding (name it with --encoding)"
TOO_LONG = "a record that is too long"
NOT_AN_EXPORT = "XML that is not a MediaWiki export"

_CHUNK_BYTES = 1 << 20
_JSON_BYTES_PER_CHARACTER = 6  # of an escape like \u00e9
_ESCAPES = {r"\n": "\n", r"\r": "\r", r"\t": "\t"}


def text_files(source: Path) -> FoundFiles:
    """Finds the text files in a folder and its subfolders, following links; or ``source`` itself, if it is a file.

    Raises:
        UserError: there is nothing to read.
    """
    if not source.exists():
        raise UserError(f"nothing to import: {source} does not exist; give an existing file or folder")
    found = find_files(source, (*SUFFIXES, PARQUET_SUFFIX))
    if not found.files:
        there = f" (there are: {found.other_kinds()}); convert them to one of these" if found.others else ""
        raise UserError(f"nothing to import: {source} has no file of the kinds {KINDS}{there}")
    return found


def parse_separator(separator: str | None) -> re.Pattern[str] | None:
    r"""Compiles a separator to a pattern in which line breaks also match Windows line breaks.

    ``\n``, ``\r`` and ``\t`` typed as two characters mean line break and tab, unless a letter follows, as in LaTeX's
    ``\newpage``.

    Raises:
        UserError: the separator is empty.
    """
    if separator is None:
        return None
    if not separator:
        raise UserError("--separator is empty; give the string between two documents, for example '\\n\\n'")
    text = re.sub(r"\\[nrt](?![A-Za-z])", lambda match: _ESCAPES[match[0]], separator)
    return re.compile(re.escape(text.replace("\r\n", "\n")).replace("\\\n", "\r?\n"))


@dataclass
class DocumentReader:
    """Reads the documents of files of any supported kind, and collects statistics.

    Attributes:
        text_field: field of JSON records, or column of tables, with the text.
        separator: splits plain text files into documents.
        encoding: encoding of files that are not Unicode and do not declare theirs; default is to detect it.
        max_characters: longer documents are split at the end of a paragraph, line or word.
        bar: progress in bytes of the files.
        left_out: files and records that are left out, by reason.
        left_out_pages: number of wiki pages that are not articles, by reason.
        recoded: files by encoding, if not UTF-8.
        divided: number of documents longer than ``max_characters``.
        plain_files: number of plain text files read.
        divided_files: number of plain text files that contained the separator.
    """

    text_field: str = TEXT_COLUMN
    separator: re.Pattern[str] | None = None
    encoding: str | None = None
    max_characters: int = MAX_DOCUMENT_CHARACTERS
    bar: ProgressBar = field(default_factory=lambda: ProgressBar("Reading text", enabled=False))
    left_out: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    left_out_pages: Counter[str] = field(default_factory=Counter)
    recoded: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    divided: int = 0
    plain_files: int = 0
    divided_files: int = 0

    def read(self, path: Path) -> Iterator[str]:
        """Yields the documents of a file; "" for null.

        Raises:
            UserError: the file is damaged or malformed, or lacks the field; the message has file and location.
        """
        size, before = path.stat().st_size, self.bar.n
        if path.suffix.lower() == ".parquet":
            for text in read_documents(path, self.text_field):
                yield from self._bounded(text or "")
            self.bar.set(before + size)
            return
        readable = user_errors(f"cannot read {path}", "correct it, or leave the file out", OSError)
        try:
            with (
                readable,
                path.open("rb") as raw,
                open_text(path, raw, self._legacy_encoding(path)) as (file, encoding),
            ):
                if encoding != "utf-8":
                    self.recoded[encoding.upper()].append(str(path))
                for text in self._texts(path, file):
                    yield text
                    self.bar.set(before + raw.tell())
        except UnknownEncoding:
            self.left_out[NOT_TEXT].append(str(path))
        except NotAnExport:
            self.left_out[NOT_AN_EXPORT].append(str(path))
        except LongRecord as error:
            raise UserError(f"{error}; raise --max_document_characters, or leave the file out") from error
        self.bar.set(before + size)

    def _legacy_encoding(self, path: Path) -> str | None:
        kind = kind_of(path)[0]
        if kind in (*HTML_SUFFIXES, *WARC_SUFFIXES, *WIKI_SUFFIXES):  # declare theirs
            return None
        try:
            return legacy_encoding(path, self.encoding)
        except UnknownEncoding:
            if kind in PLAIN_SUFFIXES:
                raise
            return None  # the record that cannot be read will be named

    def _texts(self, path: Path, file: BinaryIO) -> Iterator[str]:
        kind, limit = kind_of(path)[0], self.max_characters * _JSON_BYTES_PER_CHARACTER
        if kind in PLAIN_SUFFIXES:
            yield from self._plain(file)
        elif kind in HTML_SUFFIXES:
            content = file.read(limit + 1)
            yield from self._web_page(html_text(decode_page(content)) if len(content) <= limit else None, str(path))
        elif kind in WARC_SUFFIXES:
            for number, text in enumerate(warc_texts(file, path, limit), 1):
                yield from self._web_page(text, f"{path}: page {number}")
        elif kind in WIKI_SUFFIXES:
            limit = min(self.max_characters, MAX_PAGE_CHARACTERS)
            yield from WikiPages(path, limit, self.left_out_pages, self.left_out[TOO_LONG]).read(file)
        elif kind in JSON_LINES_SUFFIXES:
            yield from self._json_lines(path, file, limit)
        elif kind in JSON_SUFFIXES:
            for number, value in enumerate(json_values(file, str(path), limit), 1):
                yield from self._bounded(self._text_of(value, f"{path}: value {number}"))
        else:
            for row in table_rows(file, str(path), self.text_field, self.max_characters):
                yield from self._bounded(row.get(self.text_field, ""))

    def _web_page(self, text: str | None, place: str) -> Iterator[str]:
        if text is None:
            self.left_out[TOO_LONG].append(place)
        else:
            yield from self._bounded(text)

    def _json_lines(self, path: Path, file: BinaryIO, limit: int) -> Iterator[str]:
        for number, line in enumerate(iter(partial(file.readline, limit + 1), b""), 1):
            place = f"{path}:{number}"
            if len(line) > limit:
                self.left_out[TOO_LONG].append(place)
                while line and not line.endswith(b"\n"):
                    line = file.readline(_CHUNK_BYTES)
            elif line.strip():
                try:
                    record = json.loads(line)
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{place} is not valid JSON ({error}); correct or remove the line") from error
                yield from self._bounded(self._text_of(record, place))

    def _text_of(self, record: Any, place: str) -> str:
        if isinstance(record, str):
            return record
        if not isinstance(record, dict) or self.text_field not in record:
            has = f"the fields {', '.join(record)}" if isinstance(record, dict) else f"a {type(record).__name__}"
            raise UserError(f"{place} has no field `{self.text_field}` but {has}; name the field with --text_field")
        text = record[self.text_field]
        if not isinstance(text, str | None):
            raise UserError(
                f"{place}: field `{self.text_field}` is of type {type(text).__name__}, not a string; "
                "name another field with --text_field"
            )
        return text or ""

    def _plain(self, file: BinaryIO) -> Iterator[str]:
        """Yields the parts between separators. Very long parts are split before their end is read."""
        self.plain_files += 1
        decoder = codecs.getincrementaldecoder("utf-8")()
        rest, separated, in_long_part = "", False, False
        while chunk := file.read(_CHUNK_BYTES):
            rest += decoder.decode(chunk)
            if self.separator is not None:
                *parts, rest = self.separator.split(rest)
                for part in parts:
                    yield from self._bounded(part, counted=in_long_part)
                    separated, in_long_part = True, False
            if len(rest) > 2 * self.max_characters:
                end = _boundary(rest, self.max_characters)
                yield rest[:end]
                rest = rest[end:]
                self.divided += not in_long_part
                in_long_part = True
        self.divided_files += separated
        yield from self._bounded(rest + decoder.decode(b"", final=True), counted=in_long_part)

    def _bounded(self, text: str, *, counted: bool = False) -> Iterator[str]:
        """Yields the text, split if too long. Increments ``divided`` then, unless the text is already ``counted``."""
        if len(text) > self.max_characters:
            self.divided += not counted
        while len(text) > self.max_characters:
            end = _boundary(text, self.max_characters)
            yield text[:end]
            text = text[end:]
        yield text


def _boundary(text: str, max: int) -> int:
    """Where to cut: after the last paragraph, line or word that ends in the second half of ``max`` characters."""
    for mark in ("\n\n", "\n", " "):
        if (end := text.rfind(mark, max // 2, max)) >= 0:
            return end + len(mark)
    return max
