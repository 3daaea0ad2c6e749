"""Collects the English documentation of Python and of lmchat's dependencies, which every installation has.

Docstrings, Python's reference topics, README and text files are reduced to prose (`lmchat.demo.prose`), deduplicated
and written as parquet shards. Nothing is downloaded, no package is imported, and the same environment gives the same
shards.
"""

from __future__ import annotations

import hashlib
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib import metadata
from itertools import chain
from multiprocessing import get_context
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from rich.table import Table

from lmchat.data.parquet_text import TEXT_COLUMN
from lmchat.demo.prose import dedent_docstring, paragraphs
from lmchat.files import new_folder
from lmchat.progress import ProgressBar
from lmchat.types import UserError

DOCUMENT_CHARACTERS = 1000
"""Paragraphs of a file are joined into documents of about this size, which fits into a short training row."""
MIN_DOCUMENT_CHARACTERS = 120
TRAIN_SHARDS = 4
SHINGLE_WORDS = 6
MAX_SEEN_SHARE = 0.3
"""A paragraph is a near-duplicate if more than this share of its shingles (runs of words) occurred before."""

_CODE_SUFFIXES = {".py", ".pyi"}
_TEXT_SUFFIXES = {".md", ".rst", ".txt"}
_SKIPPED_FOLDERS = {
    "__pycache__",
    "_vendor",
    "dist-packages",
    "idle_test",
    "licenses",
    "site-packages",
    "test",
    "tests",
}
_SKIPPED_NAME = re.compile(r"(?i)(licen[sc]e|copying|notice|authors|third.?party)")
# Matching triple quotes is 30 times as fast as parsing the modules. Matches that are not docstrings are not prose, and
# filtered out later.
_TRIPLE_QUOTED = re.compile(r'("""|\'\'\')(.*?)\1', re.DOTALL)
_WORD = re.compile(r"[a-z0-9]+")


@dataclass(frozen=True)
class Source:
    """A package, and its files that may contain documentation."""

    name: str
    files: list[Path]


@dataclass(frozen=True)
class CorpusFile:
    """The documents of one file of a source, and whether they are held out for validation."""

    source: str
    documents: list[str]
    held_out: bool


def documentation_sources() -> list[Source]:
    """The standard library, then the installed direct and indirect dependencies of lmchat by name.

    Raises:
        UserError: lmchat is not installed, so its dependencies are unknown.
    """
    return [Source("Python", _standard_library()), *(Source(name, _files_of(dist)) for name, dist in _dependencies())]


def collect_documentation(
    output: Path,
    sources: Sequence[Source] | None = None,
    *,
    validation_share: float = 0.05,
    processes: int | None = None,
) -> list[CorpusFile]:
    """Writes parquet shards with the prose of the sources; the last shard is for validation.

    Documents are ordered by hash. All documents of a file are in the same split.

    Args:
        output: folder to create; it appears when it is complete.
        sources: None is `documentation_sources`.
        validation_share: share of the files that is held out.
        processes: number of processes; None is one per core.

    Returns:
        The files with prose.

    Raises:
        UserError: ``output`` is not empty, or there is too little prose for two shards.
    """
    sources = documentation_sources() if sources is None else sources
    with new_folder(output) as folder:
        found = _deduplicate(_read_all(sources, processes or os.cpu_count() or 1), validation_share)
        train, validation = (
            sorted((text for file in found if file.held_out == held_out for text in file.documents), key=_fraction)
            for held_out in (False, True)
        )
        if not train or not validation:
            raise UserError(
                f"found too little prose ({len(train) + len(validation)} documents) in {len(sources)} packages"
            )
        for number, texts in enumerate([*(train[at::TRAIN_SHARDS] for at in range(TRAIN_SHARDS)), validation]):
            table = pa.table({TEXT_COLUMN: texts})
            pq.write_table(table, folder / f"shard_{number:05d}.parquet", compression="zstd")
    return found


def corpus_table(files: Sequence[CorpusFile], rows: int = 10) -> Table:
    """Files, documents and size of the largest sources, of the others and of all."""
    table = Table("source", title="Text found on this machine")
    for column in ("files", "documents", "MB"):
        table.add_column(column, justify="right")

    def add(name: str, part: Sequence[CorpusFile]) -> None:
        documents = [text for file in part for text in file.documents]
        table.add_row(name, f"{len(part):,}", f"{len(documents):,}", f"{sum(map(len, documents)) / 1e6:.2f}")

    by_source: dict[str, list[CorpusFile]] = {}
    for file in files:
        by_source.setdefault(file.source, []).append(file)
    largest = sorted(by_source, key=lambda name: -sum(len(text) for file in by_source[name] for text in file.documents))
    for name in largest[:rows]:
        add(name, by_source[name])
    if rest := largest[rows:]:
        add(f"{len(rest)} others", [file for name in rest for file in by_source[name]])
    table.add_section()
    add("all", files)
    add("of these, held out", [file for file in files if file.held_out])
    return table


def _deduplicate(files: Iterable[tuple[Source, Path, list[str]]], validation_share: float) -> list[CorpusFile]:
    """Joins paragraphs to documents, without repeated paragraphs; the training files come first."""
    parts: tuple[list[tuple[Source, list[str]]], ...] = ([], [])
    for source, path, found in files:
        held_out = _fraction("/".join([source.name, *path.parts[-3:]])) < validation_share
        parts[held_out].append((source, found))
    seen: set[bytes] = set()
    # Validation files come last, so that text repeated in both splits is removed from validation.
    return [
        CorpusFile(source.name, documents, held_out)
        for held_out, part in zip((False, True), parts, strict=True)
        for source, found in part
        if (documents := list(_join(_without_repetition(found, seen))))
    ]


def _standard_library() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in _SKIPPED_FOLDERS)
        found += [Path(folder, name) for name in sorted(names)]
    return [path for path in found if _may_hold_prose(path.relative_to(root))]


def _files_of(distribution: metadata.Distribution) -> list[Path]:
    listed = sorted(file for file in distribution.files or () if ".." not in file.parts and _may_hold_prose(file))
    return [Path(str(distribution.locate_file(file))) for file in listed]


def _may_hold_prose(path: os.PathLike[str]) -> bool:
    path = Path(path)
    if _SKIPPED_FOLDERS.intersection(path.parts) or _SKIPPED_NAME.match(path.name):
        return False
    return path.suffix in _CODE_SUFFIXES | _TEXT_SUFFIXES or path.name == "METADATA"


def _dependencies() -> Iterator[tuple[str, metadata.Distribution]]:
    """The installed dependencies of lmchat by name, without lmchat itself, whose text changes too often."""
    try:
        # All installed extras of lmchat itself count.
        queue = [Requirement(line.split(";")[0]) for line in metadata.requires("lmchat") or ()]
    except metadata.PackageNotFoundError as error:
        raise UserError(
            "lmchat is not installed here, so its dependencies are unknown; run `pip install -e .`"
        ) from error
    found: dict[str, metadata.Distribution] = {}
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        try:
            distribution = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue
        if name not in found:
            found[name] = distribution
            for line in distribution.requires or ():
                needed = Requirement(line)
                extras = ("", *requirement.extras)
                if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in extras):
                    queue.append(needed)
    yield from sorted(found.items())


def _read_all(sources: Sequence[Source], processes: int) -> Iterator[tuple[Source, Path, list[str]]]:
    """Yields the prose of all files in order, read by several processes."""
    places = [(source, path) for source in sources for path in source.files]
    # A forked child would inherit the locks of other threads.
    with (
        ProgressBar("Reading", len(places), unit="files") as bar,
        ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool,
    ):
        found = pool.map(_read, (path for _, path in places), chunksize=32)
        for (source, path), prose in bar.track(zip(places, found, strict=True)):
            yield source, path, prose


def _read(path: Path) -> list[str]:
    """The prose paragraphs of a file; empty if it cannot be read."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    if path.suffix not in _CODE_SUFFIXES:
        return list(paragraphs(text))
    if path.parts[-2:] == ("pydoc_data", "topics.py"):
        from pydoc_data.topics import topics  # the language reference, a literal of one string per topic

        return list(chain.from_iterable(paragraphs(topics[name]) for name in sorted(topics)))
    docstrings = (match[2] for match in _TRIPLE_QUOTED.finditer(text))
    return list(chain.from_iterable(paragraphs(dedent_docstring(docstring)) for docstring in docstrings))


def _without_repetition(found: Iterable[str], seen: set[bytes]) -> Iterator[str]:
    """Yields the paragraphs that are not near-duplicates of earlier ones; adds their shingles to ``seen``."""
    for paragraph in found:
        words = _WORD.findall(paragraph.lower())
        runs = (" ".join(words[at : at + SHINGLE_WORDS]) for at in range(max(1, len(words) - SHINGLE_WORDS + 1)))
        shingles = {hashlib.blake2b(run.encode(), digest_size=8).digest() for run in runs}
        if len(shingles & seen) <= MAX_SEEN_SHARE * len(shingles):
            seen |= shingles
            yield paragraph


def _join(found: Iterable[str]) -> Iterator[str]:
    """Joins consecutive paragraphs into documents; drops a remainder that is too short."""
    document: list[str] = []
    size = 0
    for paragraph in found:
        if document and size + len(paragraph) > DOCUMENT_CHARACTERS:
            yield "\n".join(document)
            document, size = [], 0
        document.append(paragraph)
        size += len(paragraph) + 1
    if size >= MIN_DOCUMENT_CHARACTERS:
        yield "\n".join(document)


def _fraction(key: str) -> float:
    """A number in [0, 1) from a hash of ``key``."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest()) / 2**64
