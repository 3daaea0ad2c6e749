"""Word lists for the spelling tasks."""

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from lmchat.files import replacing
from lmchat.paths import base_dir, expand_user
from lmchat.types import UserError

# Not part of a longer word, compound or contraction.
_LOWER_CASE_WORD = re.compile(r"(?<![\w'’-])[a-z]{3,20}(?![\w'’-])")
_MAX_WORDS = 100_000


def default_words_path() -> Path:
    """Path of the default word list of the spelling tasks."""
    return base_dir() / "words.txt"


def words_from_text(texts: Iterable[str], min_count: int = 3) -> list[str]:
    """The 100,000 most frequent words of a text in that order, equally frequent ones in alphabetical order.

    Only words of 3 to 20 lower-case ASCII letters count, which excludes names, numbers and most foreign words.

    Args:
        texts: documents.
        min_count: minimum number of occurrences of a word; misspelled words are rare.
    """
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(_LOWER_CASE_WORD.findall(text))
    words = [word for word, count in counts.items() if count >= min_count]
    return sorted(words, key=lambda word: (-counts[word], word))[:_MAX_WORDS]


def write_words(words: Iterable[str], path: str | Path | None = None) -> Path:
    """Writes a word list, one word per line, to ``path`` or to `default_words_path`; returns the path.

    Raises:
        UserError: ``path`` is a folder.
    """
    file = expand_user(path) if path is not None else default_words_path()
    if file.is_dir():
        raise UserError(f"the word list {file} is a folder; name a file")
    file.parent.mkdir(parents=True, exist_ok=True)
    with replacing(file) as unfinished:
        unfinished.write_text("".join(f"{word}\n" for word in words), encoding="utf-8")
    return file


def read_words(path: str | Path | None) -> list[str]:
    """Reads a file with one word per line, without repetitions; None reads `default_words_path`.

    Raises:
        UserError: the file is missing, empty, or a line is not a word of ASCII letters.
    """
    file = expand_user(path) if path is not None else default_words_path()
    if not file.is_file():
        raise UserError(
            f"there is no word list {file}; make one from the pretraining text with `lmchat data words`, "
            "or set `words_path` to a file with one word per line"
        )
    lines = map(str.strip, file.read_text(encoding="utf-8", errors="replace").lower().splitlines())
    words = list(dict.fromkeys(filter(None, lines)))
    wrong = [word for word in words if not (word.isascii() and word.isalpha())]
    if wrong:
        listed = ", ".join(map(repr, wrong[:5]))
        raise UserError(f"{file}: {len(wrong)} lines are not words of the letters a to z ({listed}); remove them")
    if not words:
        raise UserError(f"{file} contains no words; give a file with one word per line")
    return words
