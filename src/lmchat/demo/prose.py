"""Extracts English prose from documentation: reStructuredText, Markdown and docstrings of the usual styles.

Code, tables, formulas, parameter types, headings and legal boilerplate are left out, markup is removed, and each
paragraph or list item becomes one line.
"""

import re
from collections.abc import Iterable, Iterator

MIN_WORDS = 5
MIN_PLAIN_SHARE = 0.85
"""Minimum share of ordinary words in a paragraph, as opposed to identifiers, signatures and formulas."""
MIN_FUNCTION_SHARE = 0.3
"""Minimum share of function words. English sentences have 0.4 to 0.5; lists and data have almost none."""


def _set_of(words: str) -> frozenset[str]:
    return frozenset(words.split())


FUNCTION_WORDS = _set_of(
    """
    a about after all also an and any are as at be because been before being between both but by can could do does
    each either for from given has have how if in into is it its may more most must no not of on one only or other
    over same should since so some such than that the their them then there these they this those to two under up
    use used using was we were what when where whether which while who will with would you your
    """
)

# Directives whose body is prose.
_PROSE_DIRECTIVES = _set_of(
    """
    admonition attention caution danger deprecated error hint important note tip versionadded versionchanged
    versionremoved warning
    """
)
_DIRECTIVE = re.compile(r"\.\. ([\w-]+)::\s*(.*)")
_TABLE_OR_COMMAND = ("|", "+-", "$ ", "!!!", "# ", "## ", "### ", "#### ", "---", "===")

_LIST_ITEM = re.compile(r"(?:[-*+•]|\(?\d{1,2}[.)]|\([a-z]\))\s+")
# ":param x:", "x (int, optional):", "x:" and "x -" before a description. A capital starts a sentence instead
# ("Note: ..."), unless a type follows in brackets.
_FIELD = re.compile(
    r"(?::\w+[^:]*:|[a-z_*`][\w.*`]*:(?!:)|[\w*`][\w.*`]*\s\((?:[^()]|\([^()]*\))*\)\s*:|[a-z_`][\w`]*\s+--?)\s+"
)
# "x : int, optional", above its description.
_NUMPY_FIELD = re.compile(r"[\w*`., ]+ : ")

_ROLE = re.compile(r":[A-Za-z][\w:+.-]*:`[~!]?([^`<]*?)\s*(?:<[^`>]*>)?`")
_RST_LINK = re.compile(r"`([^`<]+?)\s*<[^`>]+>`__?")
_MARKDOWN_LINK = re.compile(r"!?\[([^\]]*)\]\([^)\s]+\)")
_FOOTNOTE = re.compile(r" ?\[[\w#*-]+\]_")
_EMPHASIS = re.compile(r"\*\*?(?=\S)([^*]+?)(?<=\S)\*\*?")
_REFERENCE = re.compile(r"_+(?=\W|$)")
_TYPOGRAPHY = str.maketrans(
    {"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "...", "\u00a0": " ", "`": None}
)

_PLAIN_WORD = re.compile(r"[(\"']*(?:[A-Za-z]+(?:[-'/][A-Za-z]+)*|\d+(?:\.\d+)?%?|-)[)\"'.,;:!?]*")
_NOT_PROSE = re.compile(r"[{}\[\]\\|$@=<>^~#*]|%\(|::|https?:|www\.|__")
_LEGAL = re.compile(r"copyright|licen[sc]e|warrant|all rights|permission|redistribut|liab", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[.!?][\"')]?$")


def paragraphs(text: str) -> Iterator[str]:
    """The prose paragraphs of a documentation text in order, one line each, in ASCII."""
    lines = text.expandtabs().replace("\r", "").split("\n")
    for block in _blocks(_without_code(lines)):
        if block.count(" ") >= MIN_WORDS - 1 and (paragraph := _as_prose(_without_markup(block))) is not None:
            yield paragraph


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip(" "))


def _is_underline(line: str) -> bool:
    line = line.strip()
    return len(line) >= 3 and not line[0].isalnum() and line == line[0] * len(line)


def _without_code(lines: list[str]) -> Iterator[str]:
    """Replaces the lines of code blocks, doctests, tables, directives and headings by empty lines."""
    fenced = in_doctest = False
    code_margin: int | None = None  # lines indented deeper than this belong to a literal block or a directive
    for line, following in zip(lines, [*lines[1:], ""], strict=True):
        stripped = line.strip()
        kept = ""
        if stripped.startswith("```"):
            fenced = not fenced
        elif not stripped:
            in_doctest = False
        elif fenced or (code_margin is not None and _indent(line) > code_margin):
            pass
        else:
            code_margin = None
            in_doctest = in_doctest or stripped.startswith(">>>")
            if stripped.startswith(".."):
                kept, is_prose = _directive(stripped)
                code_margin = None if is_prose else _indent(line)
            elif stripped.endswith("::"):
                kept, code_margin = stripped[:-1], _indent(line)
            elif not (
                in_doctest
                or stripped.startswith(_TABLE_OR_COMMAND)
                or _NUMPY_FIELD.match(stripped)
                or _is_underline(stripped)
                or _is_underline(following)
            ):
                kept = stripped
        yield " " * _indent(line) + kept if kept else ""


def _directive(stripped: str) -> tuple[str, bool]:
    """The prose on a directive's own line, and whether its body is prose."""
    match = _DIRECTIVE.match(stripped)
    if match is None or match[1] not in _PROSE_DIRECTIVES:
        return "", False
    return ("" if match[1].startswith(("version", "deprecated")) else match[2]), True


def _blocks(lines: Iterable[str]) -> Iterator[str]:
    """Yields paragraphs and list items, each joined to one line. A change of indentation ends a block, too.

    The first line of a list item may be indented less than the others.
    """
    block: list[str] = []
    margin = 0
    is_item = False
    for line in lines:
        stripped, indent = line.strip(), _indent(line)
        is_field = _FIELD.match(stripped) is not None
        starts_item = _LIST_ITEM.match(stripped) is not None or (is_item and is_field)
        hangs = is_item and len(block) == 1 and indent > margin
        if block and (not stripped or starts_item or (indent != margin and not hangs)):
            yield " ".join(block)
            block = []
        if stripped:
            is_item = is_item if block else starts_item or is_field
            block.append(stripped)
            margin = indent
    if block:
        yield " ".join(block)


def _without_markup(block: str) -> str:
    block = _LIST_ITEM.sub("", block, count=1) if _LIST_ITEM.match(block) else block
    block = _ROLE.sub(r"\1", block)
    block = block[match.end() :] if (match := _FIELD.match(block)) else block
    block = _MARKDOWN_LINK.sub(r"\1", _RST_LINK.sub(r"\1", block))
    block = _EMPHASIS.sub(r"\1", _FOOTNOTE.sub("", block))
    return _REFERENCE.sub("", " ".join(block.translate(_TYPOGRAPHY).split()))


def _as_prose(block: str) -> str | None:
    """The block, capitalized and ending with a full stop; None if it is not English prose."""
    words = block.split()
    if len(words) < MIN_WORDS or not block.isascii() or not (block[0].isalpha() or block[0] in "\"'("):
        return None
    if _NOT_PROSE.search(block) or _LEGAL.search(block):
        return None
    plain = [word.strip("\"'().,;:!?").lower() for word in words if _PLAIN_WORD.fullmatch(word)]
    if len(plain) < MIN_PLAIN_SHARE * len(words):
        return None
    if sum(word in FUNCTION_WORDS for word in plain) < MIN_FUNCTION_SHARE * len(words):
        return None
    if not _SENTENCE_END.search(block):
        if not block[-1].isalnum():
            return None
        block += "."
    return block[0].upper() + block[1:]
