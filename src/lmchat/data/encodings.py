"""Finds the encoding of text that is not Unicode.

charset-normalizer detects the script. Encodings of the same script differ in a few letters; the one whose text fits an
alphabet best is chosen. ``docs/LOG.md`` has the accuracy.
"""

import codecs
import re
from collections import Counter
from pathlib import Path

from lmchat.records import open_text
from lmchat.types import UserError

SAMPLE_BYTES = 1 << 16

_SUPERSETS = {
    "ascii": "cp1252", "iso8859-1": "cp1252", "iso8859-9": "cp1254", "iso8859-11": "cp874", "tis-620": "cp874",
    "gb2312": "gb18030", "gbk": "gb18030", "big5": "big5hkscs", "shift_jis": "cp932", "euc_kr": "cp949",
}  # fmt: skip

_MIN_LATIN_BYTES, _MIN_BYTES = 8, 40  # minimum number of non-ASCII bytes to detect from
_MIN_FIT, _MIN_FIT_ALONE = 0.7, 0.9  # the latter where charset-normalizer finds nothing
_MULTIBYTE = ["gb18030", "big5hkscs", "cp932", "euc_jp", "cp949", "johab"]
_OTHERS = ["cp1255", "iso8859_8", "cp1256", "iso8859_6", "cp874"]
_SEVEN_BIT = ["iso2022_kr", "iso2022_jp_2"]
_ESCAPE = b"\x1b$"  # starts two-byte characters in seven-bit encodings
_PUNCTUATION = "“”‘’‚„«»‹›–—…€°§·•©®™№\xa0×"
_LATIN = [
    "äöüß", "éèêëàâæçîïôœùûÿ", "áéíóúüñ¿¡ªº", "áâãàçéêíóôõúªº", "àèéìíòóù", "åäöé", "åæøéèêóòô", "ąćęłńóśźż",
    "áčďéěíňóřšťúůýž", "áäčďéíĺľňóôŕšťúýž", "áéíóöőúüű", "ăâîșțşţ", "çğıİöşüâîû", "ąčęėįšųūž", "āčēģīķļņšūž", "čćđšž",
    "áðéíóúýþæö", "ëçéèïöüáíóú", "õäöüšž", "àáâãèéêìíòóôõùúýăđĩũơư\u0300\u0301\u0303\u0309\u0323",
]  # fmt: skip
_CYRILLIC = [
    "абвгдеёжзийклмнопрстуфхцчшщъыьэюя", "абвгґдеєжзиіїйклмнопрстуфхцчшщьюя", "абвгдђежзијклљмнњопрстћуфхцчџш",
]  # fmt: skip
_FAMILIES = (  # letters of a script, its encodings by preference, the alphabets of its languages
    (
        "\u00aa-\u024f\u1e00-\u1eff",
        ["cp1252", "cp1250", "iso8859_2", "cp1254", "iso8859_15", "cp1257", "iso8859_13", "cp1258", "iso8859_16",
         "cp850", "cp852", "mac_roman"],
        _LATIN,
    ),
    ("\u0370-\u03ff", ["cp1253", "iso8859_7"], ["αβγδεζηθικλμνξοπρσςτυφχψωάέήίόύώϊϋΐΰ"]),
    ("\u0400-\u04ff", ["cp1251", "koi8_r", "koi8_u", "iso8859_5", "cp866"], _CYRILLIC),
)  # fmt: skip
_CANDIDATES = [name for _, names, _ in _FAMILIES for name in names] + _OTHERS + _MULTIBYTE
_WORD = re.compile(r"[^\W\d_]{2,}")
_ASCII = re.compile(r"[\0-\x7f]+")


def browser_encoding(name: str) -> str | None:
    """Python's name of an encoding as web browsers read it: ISO-8859-1 as Windows-1252; None if it is unknown."""
    try:
        known = codecs.lookup(name).name
    except LookupError:
        return None
    return _SUPERSETS.get(known, known)


class UnknownEncoding(UserError):
    """A file is not text, or its encoding is unknown."""


def legacy_encoding(path: Path, encoding: str | None = None) -> str | None:
    """The encoding of a text file, compressed or not, that is not Unicode, by default detected; None if it is Unicode.

    Raises:
        UnknownEncoding: the file has zero bytes, or is in no known encoding from its beginning to its end.
    """
    sample = _not_decoded(path, None)
    if sample is None:
        return None
    name = encoding or detect_encoding(sample)
    if name is None or _not_decoded(path, name) is not None:
        raise UnknownEncoding(f"the encoding of {path} is unknown")
    return name


def _not_decoded(path: Path, encoding: str | None) -> bytes | None:
    """A sample from the first line that an encoding (default: Unicode) cannot decode; None if it can decode all."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    with path.open("rb") as raw, open_text(path, raw, encoding) as (file, on_disk):
        try:
            while chunk := file.read(SAMPLE_BYTES):
                if b"\0" in chunk or (encoding is None and _ESCAPE in chunk):
                    return chunk if _ESCAPE in chunk else b""
                decoder.decode(chunk)
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            line = error.object.rfind(b"\n", 0, error.start) + 1
            return error.object[line:] + file.read(SAMPLE_BYTES) if on_disk == "utf-8" else b""
    return None


def detect_encoding(sample: bytes) -> str | None:
    """The encoding of some text that is not Unicode; None if there is too little of it, or none fits."""
    if _ESCAPE in sample:
        return next((name for name in _SEVEN_BIT if _decoded(sample, name) is not None), None)
    size = len(sample.translate(None, bytes(range(128))))
    if size < _MIN_LATIN_BYTES or _is_damaged_utf8(sample):
        return None
    name = _best_guess(sample, _CANDIDATES)
    if name == "cp932" and _share(sample.decode(name, "ignore"), "[\uff61-\uff9f]") > 0.5:  # half-width letters alone
        name = _best_guess(sample, [candidate for candidate in _CANDIDATES if candidate not in _MULTIBYTE])
    text = sample.decode(name or "cp1252", "ignore")
    for letters, names, alphabets in _FAMILIES:
        if _share(text, f"[{letters}]") > 0.5 or (alphabets is _LATIN and not _share(text, ".")):
            if alphabets is not _LATIN and _is_hebrew(sample):
                return "cp1255"
            fits = {name: _fit(sample, name, alphabets) for name in names}
            best = max(names, key=fits.__getitem__)
            fits_well = fits[best] >= (_MIN_FIT if name else _MIN_FIT_ALONE)
            return best if fits_well and (size >= _MIN_BYTES or alphabets is _LATIN) else None
    return name if size >= _MIN_BYTES else None


def _is_hebrew(sample: bytes) -> bool:
    """Whether text taken for Cyrillic or Greek is Hebrew: no capitals, and no final forms of letters within words."""
    lower_case = _share(sample.decode("latin-1"), "[\xe0-\xfa]") > 0.985
    return lower_case and not re.search("[ךםןףץ][א-ת]", sample.decode("cp1255", "ignore"))


def _best_guess(sample: bytes, candidates: list[str]) -> str | None:
    import charset_normalizer

    best = charset_normalizer.from_bytes(sample, cp_isolation=candidates).best()
    return best.encoding if best else None


def _decoded(sample: bytes, encoding: str) -> str | None:
    """The text, which may end within a character; None if it is not in this encoding."""
    for end in range(4):
        try:
            return sample[: len(sample) - end].decode(encoding)
        except UnicodeDecodeError:
            continue
    return None


def _is_damaged_utf8(sample: bytes) -> bool:
    """Whether most of the non-ASCII characters are valid UTF-8."""
    text = sample.decode("utf-8", "replace")
    return 2 * text.count("\ufffd") < len(_ASCII.sub("", text))


def _share(text: str, letters: str) -> float:
    """Share of some letters among those that are not ASCII."""
    others = "".join(filter(str.isalpha, _ASCII.sub("", text)))
    return len(re.findall(letters, others)) / max(1, len(others))


def _fit(sample: bytes, encoding: str, alphabets: list[str]) -> float:
    """Share of the characters in the best alphabet, less the share of letters that are capitals within words."""
    text = _decoded(sample, encoding)
    if text is None:
        return -1
    counts = Counter(_ASCII.sub("", text))
    known = max(
        sum(count for character, count in counts.items() if character.lower() in alphabet + _PUNCTUATION)
        for alphabet in alphabets
    )
    words = _WORD.findall(text)
    capitals = sum(map(str.isupper, "".join(word[1:] for word in words)))
    return known / max(1, counts.total()) - capitals / max(1, sum(map(len, words)))
