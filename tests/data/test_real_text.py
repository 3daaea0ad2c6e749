"""Real text in many scripts and encodings: message catalogues of this machine, and CPython's codec tests."""

from __future__ import annotations

import gettext
import random
import re
import site
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from lmchat.__main__ import main
from lmchat.data.encodings import UnknownEncoding, detect_encoding, legacy_encoding
from lmchat.data.parquet_text import list_shards
from lmchat.tokenizer.bpe import Tokenizer
from lmchat.tokenizer.compression import count_scripts

LOCALES = [Path("/usr/share/locale"), *(Path(folder) for folder in site.getsitepackages())]
CODECS = Path(next(iter(__import__("test").__path__)), "cjkencodings")

LANGUAGES = {
    "Cyrillic": ("ru", ["koi8-r", "cp1251", "iso8859-5", "cp866"]),
    "Greek": ("el", ["cp1253", "iso8859-7"]),
    "Han": ("zh_CN", ["gb18030", "gbk"]),
    "Hiragana": ("ja", ["cp932", "euc-jp", "iso2022-jp-2"]),
    "Hangul": ("ko", ["cp949", "johab"]),
    "Arabic": ("ar", ["cp1256"]),
    "Hebrew": ("he", ["cp1255"]),
    "Thai": ("th", ["cp874"]),
    "Devanagari": ("hi", []),
    "Georgian": ("ka", []),
}
"""Scripts with a language and the encodings in which its text is found."""
LATIN = {
    "de": ["cp1252", "cp850"], "fr": ["cp1252", "iso8859-15"], "es": ["cp1252"], "pt": ["cp1252"], "sv": ["cp1252"],
    "pl": ["iso8859-2", "cp1250"], "cs": ["iso8859-2", "cp1250"], "hu": ["iso8859-2", "cp1250"], "tr": ["cp1254"],
    "vi": ["cp1258"], "lt": ["cp1257"], "uk": ["koi8-u", "cp1251"], "bg": ["cp1251"], "sr": ["cp1251", "iso8859-5"],
    "zh_TW": ["big5hkscs"],
}  # fmt: skip
UNICODE = ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"]


@cache
def catalogues() -> dict[str, list[Path]]:
    """Files of translated messages by language."""
    pattern = "LC_MESSAGES/*.mo"
    files = [
        *LOCALES[0].glob(f"*/{pattern}"),
        *(file for folder in LOCALES[1:] for file in folder.glob(f"**/{pattern}")),
    ]
    found: dict[str, list[Path]] = {}
    for file in sorted(files):
        found.setdefault(file.parents[1].name, []).append(file)
    return found


@cache
def messages(language: str) -> list[str]:
    """Translated non-ASCII messages of a language."""
    found: set[str] = set()
    for file in catalogues().get(language, [])[:40]:
        with file.open("rb") as opened:
            catalogue = gettext.GNUTranslations(opened)._catalog.items()  # type: ignore[attr-defined]
        texts = (text for key, text in catalogue if key and isinstance(text, str) and not text.isascii())
        found |= {re.sub(r"[\0-\x1f]+", " ", text) for text in texts}
    return sorted(found)


def text_in(language: str, encoding: str, characters: int, seed: int = 0) -> str:
    """Some text of a language that an encoding can encode."""
    rng = random.Random(f"{language} {encoding} {characters} {seed}")
    texts, size, chosen = messages(language), 0, []
    while size < characters:
        chosen.append(rng.choice(texts).encode(encoding, "ignore").decode(encoding))
        size += len(chosen[-1]) + 1
    return "\n".join(chosen)


def recognized_text_in(language: str, encoding: str, characters: int) -> str:
    """As `text_in`, of an encoding that is detected; that of one text in 60 is not (`test_encodings_are_detected`)."""
    texts = (text_in(language, encoding, characters, seed) for seed in range(3))
    return next(text for text in texts if detect_encoding(text.encode(encoding)))


def has_text(language: str) -> bool:
    """Whether there is enough text in a language; not known before the tests run, since reading it takes seconds."""
    return len(messages(language)) >= 500


def test_enough_scripts_are_here() -> None:
    if not LOCALES[0].is_dir():
        pytest.skip("there are no message catalogues in /usr/share/locale")
    found = {script for script, (language, _) in LANGUAGES.items() if has_text(language)}
    if missing := sorted(set(LANGUAGES) - found):
        pytest.skip(f"no text in {', '.join(missing)}")
    assert len(found) >= 5


@pytest.mark.parametrize("script", LANGUAGES)
def test_import_of_a_script(
    script: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text in every encoding is imported unchanged, its encoding is reported, and a poor tokenizer gives a warning."""
    language, legacy = LANGUAGES[script]
    if not has_text(language):
        pytest.skip(f"no text in {script}")
    monkeypatch.setenv("LMCHAT_BASE_DIR", str(tmp_path))
    (tmp_path / "in").mkdir()
    texts = {encoding: text_in(language, encoding, 3000) for encoding in UNICODE}
    texts |= {encoding: recognized_text_in(language, encoding, 3000) for encoding in legacy}
    for encoding, text in texts.items():
        (tmp_path / "in" / f"{encoding}.txt").write_bytes(text.encode(encoding))
    main(["data", "import", str(tmp_path / "in"), "--validation_fraction", "0.5"])
    shards = [pq.read_table(path)["text"].to_pylist() for path in list_shards(tmp_path / "base_data")]
    assert sorted(text for shard in shards for text in shard) == sorted(texts.values())
    report = capsys.readouterr().out
    for encoding in texts:
        told = re.search(rf"read as \S+: .*{encoding}\.txt|read as \S+: [2-9] files", report)
        assert told or encoding.startswith("utf-8")
    Tokenizer.train([Path(random.__file__).read_text()], 400).save(tmp_path / "tokenizer")
    main(["tokenizer", "eval"])
    shown = capsys.readouterr().out
    assert re.search(rf"{script}.*: fewer than", shown.replace("\n", " "))
    counts = count_scripts(Tokenizer.load(tmp_path / "tokenizer"), texts["utf-8"])
    assert script in list(counts)[: 3 if script == "Hiragana" else 2] and counts[script].is_poor


@pytest.mark.parametrize(
    "name", ["big5", "euc_jp", "gb18030", "gb2312", "gbk", "iso2022_jp", "iso2022_kr", "shift_jis", "cp949", "johab"]
)
def test_files_of_cpython(name: str) -> None:
    """Each is read as its copy in UTF-8, or reported as left out."""
    if not CODECS.is_dir():
        pytest.skip("CPython's test package is not installed")
    path = CODECS / f"{name}.txt"
    try:
        encoding = legacy_encoding(path)
    except UnknownEncoding:
        assert name in ("cp949", "johab")  # except six lines of rare syllables
        return
    assert encoding and path.read_bytes().decode(encoding) == (CODECS / f"{name}-utf8.txt").read_text()


def detections(characters: int, seeds: int) -> Iterator[tuple[bool, bool]]:
    """For texts in all languages and encodings: whether an encoding was detected, and whether the text is correct."""
    for language, encodings in {**dict(LANGUAGES.values()), **LATIN}.items():
        for encoding in encodings if has_text(language) else ():
            for seed in range(seeds):
                text = text_in(language, encoding, characters, seed)
                content = text.encode(encoding)
                told = detect_encoding(content)
                yield told is not None, told is not None and content.decode(told, "replace") == text


@pytest.mark.parametrize(
    ("characters", "seeds", "right", "wrong"), [(100, 8, 0.7, 0.02), (1000, 4, 0.95, 0.02), (10_000, 2, 0.95, 0.02)]
)
def test_encodings_are_detected(characters: int, seeds: int, right: float, wrong: float) -> None:
    results = list(detections(characters, seeds))
    if not results:
        pytest.skip("there are no message catalogues")
    rights = sum(is_right for _, is_right in results) / len(results)
    wrongs = sum(told and not is_right for told, is_right in results) / len(results)
    print(f"{characters} characters, {len(results)} texts: {rights:.1%} right, {wrongs:.1%} wrong", file=sys.stderr)
    assert rights >= right and wrongs <= wrong
