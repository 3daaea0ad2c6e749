"""Collects the English documentation of Python and of lmchat's dependencies, which every installation has.

Docstrings, Python's reference topics, README and text files are reduced to prose (`lmchat.demo.prose`), deduplicated
and written as parquet shards. Nothing is downloaded, no package is imported, and the same environment gives the same
shards.
"""

import hashlib
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from importlib import metadata
from inspect import cleandoc
from itertools import chain
from multiprocessing import get_context
from pathlib import Path
from pydoc_data.topics import topics

import pyarrow as pa
import pyarrow.parquet as pq
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from lmchat.data.parquet_text import TEXT_COLUMN
from lmchat.demo.prose import paragraphs
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
_SKIPPED_FOLDER = re.compile(r"__pycache__|_vendor|dist-packages|idle_test|licenses|site-packages|tests?")
_SKIPPED_NAME = re.compile(r"(?i)(licen[sc]e|copying|notice|authors|third.?party)")
# Matching triple quotes is 30 times as fast as parsing the modules. Matches that are not docstrings are not prose, and
# filtered out later.
_TRIPLE_QUOTED = re.compile(r'("""|\'\'\')(.*?)\1', re.DOTALL)
_WORD = re.compile(r"[a-z0-9]+")


@dataclass(frozen=True)
class CorpusFile:
    """The documents of one file of a package, and whether they are held out for validation."""

    source: str
    documents: list[str]
    held_out: bool


def documentation_files() -> dict[str, list[Path]]:
    """The files of the standard library, then of lmchat's installed direct and indirect dependencies by name.

    Raises:
        UserError: lmchat is not installed, so its dependencies are unknown.
    """
    return {"Python": _standard_library(), **dict(_dependencies())}


def collect_documentation(
    output: Path,
    sources: Mapping[str, Sequence[Path]] | None = None,
    *,
    validation_share: float = 0.05,
    processes: int | None = None,
) -> list[CorpusFile]:
    """Writes parquet shards with the prose of the sources, the last one for validation; returns the files with prose.

    Documents are ordered by hash. All documents of a file are in the same split.

    Args:
        output: folder to create; it appears when it is complete.
        sources: files that may contain documentation, by package; None is `documentation_files`.
        validation_share: share of the files that is held out.
        processes: number of processes; None is one per core.

    Raises:
        UserError: ``output`` is not empty, or there is too little prose for two shards.
    """
    sources = documentation_files() if sources is None else sources
    with new_folder(output) as folder:
        found = _deduplicate(_read_all(sources, processes or os.cpu_count() or 1), validation_share)
        train, validation = (
            sorted((text for file in found if file.held_out == held_out for text in file.documents), key=_fraction)
            for held_out in (False, True)
        )
        if not train or not validation:
            raise UserError(
                f"found too little prose ({len(train) + len(validation)} documents) in {len(sources)} packages; train "
                "on your own text with --text FOLDER (make demo TEXT=folder)"
            )
        for number, texts in enumerate([*(train[at::TRAIN_SHARDS] for at in range(TRAIN_SHARDS)), validation]):
            table = pa.table({TEXT_COLUMN: texts})
            pq.write_table(table, folder / f"shard_{number:05d}.parquet", compression="zstd")
    return found


def _deduplicate(files: Iterable[tuple[str, Path, list[str]]], validation_share: float) -> list[CorpusFile]:
    """Joins paragraphs to documents, without repeated paragraphs."""
    found = [
        CorpusFile(source, prose, _fraction("/".join([source, *path.parts[-3:]])) < validation_share)
        for source, path, prose in files
    ]
    seen: set[bytes] = set()
    # Validation files come last, so that text repeated in both splits is removed from validation.
    return [
        replace(file, documents=documents)
        for file in sorted(found, key=lambda file: file.held_out)
        if (documents := list(_join(_without_repetition(file.documents, seen))))
    ]


def _standard_library() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not _SKIPPED_FOLDER.fullmatch(name))
        found += [Path(folder, name) for name in sorted(names)]
    return [path for path in found if _may_hold_prose(path.relative_to(root))]


def _may_hold_prose(path: os.PathLike[str]) -> bool:
    path = Path(path)
    if any(map(_SKIPPED_FOLDER.fullmatch, path.parts)) or _SKIPPED_NAME.match(path.name):
        return False
    return path.suffix in _CODE_SUFFIXES | _TEXT_SUFFIXES or path.name == "METADATA"


def _dependencies() -> Iterator[tuple[str, list[Path]]]:
    """Files of the installed dependencies of lmchat by name, without lmchat itself, whose text changes too often."""
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
    for package, distribution in sorted(found.items()):
        listed = sorted(file for file in distribution.files or () if ".." not in file.parts and _may_hold_prose(file))
        yield package, [Path(str(distribution.locate_file(file))) for file in listed]


def _read_all(sources: Mapping[str, Sequence[Path]], processes: int) -> Iterator[tuple[str, Path, list[str]]]:
    """Yields the prose of all files in order, read by several processes."""
    places = [(source, path) for source, paths in sources.items() for path in paths]
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
    if path.parts[-2:] == ("pydoc_data", "topics.py"):  # the language reference, a literal of one string per topic
        return list(chain.from_iterable(paragraphs(topics[name]) for name in sorted(topics)))
    docstrings = (match[2] for match in _TRIPLE_QUOTED.finditer(text))
    return list(chain.from_iterable(paragraphs(cleandoc(docstring)) for docstring in docstrings))


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
