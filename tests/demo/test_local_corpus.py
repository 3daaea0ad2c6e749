from __future__ import annotations

import random
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from lmchat.demo import local_corpus
from lmchat.demo.local_corpus import collect_documentation, documentation_files
from lmchat.types import UserError


def sentence(seed: int) -> str:
    """A sentence of invented words."""
    draw = random.Random(seed).choice
    a, b, c, d, e, f = ("".join(draw("bdfgklmnprst") + draw("aeiou") for _ in range(4)) for _ in range(6))
    return f"The {a} {b} is for those {c} which the {d} has in the {e} and the {f}."


@pytest.fixture
def packages(tmp_path: Path) -> dict[str, list[Path]]:
    """Two packages of 40 modules, each of which has its own docstrings and one that they all share."""
    sources: dict[str, list[Path]] = {}
    for package in ("first", "second"):
        folder = tmp_path / package
        folder.mkdir()
        for module in range(40):
            own = [sentence(1000 * len(sources) + 10 * module + i) for i in range(8)]
            docstrings = [f'"""{text}"""' for text in [*own, "This is what all of the modules have to say in common."]]
            (folder / f"m{module:02d}.py").write_text("\n\n".join(docstrings))
        sources[package] = sorted(folder.iterdir())
    return sources


def read(folder: Path) -> list[list[str]]:
    return [pq.read_table(path)["text"].to_pylist() for path in sorted(folder.glob("*.parquet"))]


def shingles(text: str) -> set[tuple[str, ...]]:
    words = "".join(c if c.isalnum() else " " for c in text.lower()).split()
    size = local_corpus.SHINGLE_WORDS
    return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}


def test_shards_do_not_depend_on_the_number_of_processes(packages: dict[str, list[Path]], tmp_path: Path) -> None:
    for name, processes in (("one", 1), ("two", 2)):
        collect_documentation(tmp_path / name, packages, validation_share=0.2, processes=processes)
    one, two = ({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in ("one", "two"))
    assert one == two
    assert len(one) == 5


def test_paragraphs_do_not_repeat_within_or_across_splits(packages: dict[str, list[Path]], tmp_path: Path) -> None:
    files = collect_documentation(tmp_path / "out", packages, validation_share=0.2, processes=1)
    *train, validation = read(tmp_path / "out")
    everything = [line for shard in [*train, validation] for text in shard for line in text.split("\n")]
    assert sum("modules have to say" in line for line in everything) == 1
    assert len(set(everything)) == len(everything)
    trained = {shingle for shard in train for text in shard for line in text.split("\n") for shingle in shingles(line)}
    for text in validation:
        for line in text.split("\n"):
            own = shingles(line)
            assert len(own & trained) <= local_corpus.MAX_SEEN_SHARE * len(own)
    documents = {
        held_out: [text for file in files if file.held_out == held_out for text in file.documents]
        for held_out in (False, True)
    }
    assert sorted(documents[False]) == sorted(text for shard in train for text in shard)
    assert sorted(documents[True]) == sorted(validation)


def test_all_documents_of_a_file_are_in_one_split(tmp_path: Path) -> None:
    """Documents of a file start with its own word."""
    folder = tmp_path / "package"
    folder.mkdir()
    for module in range(60):
        lines = [f"Zq{module} is {sentence(100 * module + n).lower()}" for n in range(30)]
        (folder / f"m{module}.rst").write_text("\n\n".join(lines))
    source = {"package": sorted(folder.iterdir())}
    collect_documentation(tmp_path / "out", source, validation_share=0.3, processes=1)
    *train, validation = ({text.split()[0] for text in shard} for shard in read(tmp_path / "out"))
    assert validation and not validation & set().union(*train)
    assert not any(
        any(len(text) > 2 * local_corpus.DOCUMENT_CHARACTERS for text in shard) for shard in read(tmp_path / "out")
    )


def test_a_non_empty_folder_is_refused(packages: dict[str, list[Path]], tmp_path: Path) -> None:
    (tmp_path / "file.txt").write_text("mine")
    with pytest.raises(UserError, match="is not empty"):
        collect_documentation(tmp_path, packages, processes=1)


def test_too_little_prose_is_reported(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\n")
    with pytest.raises(UserError, match="too little prose"):
        collect_documentation(tmp_path / "out", {"a": [tmp_path / "a.py"]}, processes=1)
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def machine() -> dict[str, list[Path]]:
    return documentation_files()


def test_this_machine_has_documentation(machine: dict[str, list[Path]]) -> None:
    assert next(iter(machine)) == "Python"
    assert {"torch", "numpy", "rich", "mpmath"} <= set(machine)
    assert "lmchat" not in machine
    assert len(machine["torch"]) > 500
    files = [path for paths in machine.values() for path in paths]
    assert len(set(files)) == len(files)
    assert not any(part in ("tests", "site-packages") for path in machine["Python"] for part in path.parts[-3:])


def test_the_language_reference_is_read(machine: dict[str, list[Path]]) -> None:
    topics = next(path for path in machine["Python"] if path.parts[-2:] == ("pydoc_data", "topics.py"))
    found = local_corpus._read(topics)
    assert sum(map(len, found)) > 100_000
    assert any(line.startswith("Code objects represent byte-compiled executable Python code") for line in found)
