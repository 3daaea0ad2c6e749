"""Text of web pages: HTML files, and WARC files of crawls."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from lmchat.data.encodings import SAMPLE_BYTES, browser_encoding, detect_encoding
from lmchat.types import user_errors

HTML_SUFFIXES = (".html", ".htm", ".xhtml")
WARC_SUFFIXES = (".warc", ".wet")

_HIDDEN = ("script", "style", "noscript", "template", "head", "svg", "iframe")
_LINES = ("address", "br", "dd", "details", "dt", "figure", "footer", "form", "header", "hr", "li", "main", "nav", "tr")
_PARAGRAPHS = (
    "article", "aside", "blockquote", "div", "dl", "h1", "h2", "h3", "h4", "h5", "h6", "ol", "p", "pre", "section",
    "table", "ul",
)  # fmt: skip
_GAPS = {"td": " ", "th": " ", **dict.fromkeys(_LINES, "\n"), **dict.fromkeys(_PARAGRAPHS, "\n\n")}
"""What is before and after an element."""

_MALFORMED = (AttributeError, LookupError, TypeError, ValueError)
"""What warcio raises for missing and malformed headers."""
_MAX_HEADER_BYTES = 1 << 22  # of a WARC record, with those of the page in it; warcio has no limit
_CHARSET = re.compile(rb"charset\s*=\s*[\"']?\s*([\w.:-]+)", re.IGNORECASE)


def html_text(html: str) -> str:
    """The visible text of a page, with line breaks between blocks and empty lines between paragraphs.

    Raises:
        UserError: selectolax is not installed.
    """
    with user_errors("reading HTML needs selectolax", "install it: pip install 'lmchat[web]'", ImportError):
        from selectolax.lexbor import LexborHTMLParser
    tree = LexborHTMLParser(html)
    if tree.body is None:
        return ""
    tree.strip_tags(list(_HIDDEN))
    parts: list[str] = []
    try:
        _add_text(tree.body, parts, preformatted=False)
    except RecursionError:  # nested more deeply than real pages
        parts = [tree.body.text(separator=" ")]
    lines = [re.sub(r"[ \t\f\v\r]+", " ", line).strip() for line in "".join(parts).split("\n")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _add_text(node: Any, parts: list[str], preformatted: bool) -> None:
    """Adds the text below a node, in order."""
    for child in node.iter(include_text=True):
        if child.tag == "-text":
            text = child.text_content or ""
            parts.append(text if preformatted else re.sub(r"\s+", " ", text))
            continue
        gap = _GAPS.get(child.tag, "")
        parts.append(gap)
        _add_text(child, parts, preformatted or child.tag == "pre")
        parts.append(gap)


def decode_page(content: bytes, charset: str | None = None) -> str:
    """Decodes a page by ``charset``, its own declaration, or detection; invalid bytes become U+FFFD."""
    declared = _CHARSET.search(content[:2048])
    for name in (charset, declared[1].decode("ascii") if declared else None):
        if name and (encoding := browser_encoding(name)):
            return content.decode(encoding, errors="replace")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        start = content.rfind(b"\n", 0, error.start) + 1
        return content.decode(detect_encoding(content[start : start + SAMPLE_BYTES]) or "utf-8", errors="replace")


def warc_texts(file: BinaryIO, path: Path, max_bytes: int) -> Iterator[str | None]:
    """The text of each HTML response, and of each plain text record (WET), in a WARC file; None if it is too long.

    Raises:
        UserError: warcio is not installed, or the file is damaged.
    """
    with user_errors("reading WARC files needs warcio", "install it: pip install 'lmchat[web]'", ImportError):
        from warcio.archiveiterator import ArchiveIterator
        from warcio.exceptions import ArchiveLoadFailed
    records, header_bytes = ArchiveIterator(file), 0
    read_line = records.reader.readline

    def read_bounded_line(length: int | None = None) -> bytes:
        nonlocal header_bytes
        line: bytes = read_line(_MAX_HEADER_BYTES if length is None else min(length, _MAX_HEADER_BYTES))
        header_bytes += len(line)
        if header_bytes >= _MAX_HEADER_BYTES:
            raise ArchiveLoadFailed(f"a record has {_MAX_HEADER_BYTES:,} bytes of headers")
        return line

    records.reader.readline = read_bounded_line
    damaged = f"{path} is not a WARC file, or it is damaged"
    with user_errors(damaged, "copy or create it again", ArchiveLoadFailed, EOFError, OSError, *_MALFORMED):
        for record in records:
            header_bytes = 0
            headers = record.http_headers if record.rec_type == "response" else record.rec_headers
            kind = (headers.get_header("Content-Type") or "").lower() if headers else ""
            charset = match[1].decode("ascii") if (match := _CHARSET.search(kind.encode())) else None
            if record.rec_type == "response" and kind.startswith(("text/html", "application/xhtml")):
                content = record.content_stream().read(max_bytes + 1)
                yield html_text(decode_page(content, charset)) if len(content) <= max_bytes else None
            elif record.rec_type == "conversion" and kind.startswith("text/plain"):
                content = record.content_stream().read(max_bytes + 1)
                yield decode_page(content, charset) if len(content) <= max_bytes else None
