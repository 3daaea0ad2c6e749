"""Text of wikis: MediaWiki XML exports, such as Wikipedia's ``pages-articles`` dumps."""

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO
from xml.parsers import expat

from lmchat.types import UserError, user_errors

WIKI_SUFFIXES = (".xml",)

MAX_PAGE_CHARACTERS = 1 << 21
"""MediaWiki's own limit of a page ($wgMaxArticleSize); longer pages are left out."""

_CHUNK_BYTES = 1 << 18
_MAX_TAG_BYTES = 1 << 20
_MAX_DEPTH = 20  # an export has 5 levels
_KEPT = ("title", "ns", "model", "text")  # elements of a page
_MEDIA_NAMESPACES = {"6", "14"}  # files and categories
_HIDDEN_TAGS = {
    "categorytree", "chem", "ce", "gallery", "graph", "hiero", "imagemap", "inputbox", "mapframe", "maplink", "math",
    "ref", "references", "score", "table", "templatedata", "templatestyles", "timeline",
}  # fmt: skip
_SECTION = re.compile(r"(?m)^(?===)")
_MARKS = re.compile(r"'{2,}|__[A-Z]+__")  # bold and italic; behaviour switches such as __NOTOC__


class NotAnExport(UserError):
    """An XML file is not a MediaWiki export."""


class WikiPages:
    """Reads the pages of one MediaWiki export as a stream, and counts those that are left out.

    Args:
        path: name of the file for errors.
        max_characters: longest wikitext of a page.
        left_out: counts pages that are not articles, by reason.
        long_pages: takes the places of pages that are too long.
    """

    def __init__(self, path: Path, max_characters: int, left_out: Counter[str], long_pages: list[str]) -> None:
        self.path = path
        self.max_characters = max_characters
        self.left_out = left_out
        self.long_pages = long_pages
        self._elements: list[str] = []  # open elements, outermost first
        self._page: dict[str, list[str]] = {}
        self._size = 0
        self._redirect = self._is_export = False
        self._namespace_key = ""
        self._media = {"file", "image", "category"}  # and their names in the wiki's language
        self._ready: list[tuple[str, str]] = []
        # The content is decoded already; what the XML declaration says about its encoding does not matter.
        self._parser = expat.ParserCreate("utf-8", namespace_separator=" ")
        self._parser.buffer_text = True
        self._parser.StartDoctypeDeclHandler = self._refuse_doctype
        self._parser.StartElementHandler = self._start
        self._parser.EndElementHandler = self._end
        self._parser.CharacterDataHandler = self._characters

    def read(self, file: BinaryIO) -> Iterator[str]:
        """Yields title and text of each article: wikitext pages of namespace 0 that are not redirects.

        Raises:
            NotAnExport: the file is something else.
            UserError: mwparserfromhell is not installed, or the XML is malformed or cut off.
        """
        size = 0
        while True:
            chunk = file.read(_CHUNK_BYTES)
            try:
                self._parser.Parse(chunk, not chunk)
            except expat.ExpatError as error:
                if not self._is_export:
                    raise NotAnExport(f"{self.path} is not XML ({error})") from error
                raise UserError(f"{self.path} is damaged or truncated ({error}); copy or create it again") from error
            size += len(chunk)
            if size - self._parser.CurrentByteIndex > _MAX_TAG_BYTES:
                raise self._refusal(f"it has a tag longer than {_MAX_TAG_BYTES:,} bytes")
            for title, text in self._ready:
                yield f"{title}\n\n{wiki_text(text, self._media)}".strip()
            self._ready.clear()
            if not chunk:
                return

    def _refusal(self, reason: str) -> UserError:
        return UserError(f"{self.path} is not a MediaWiki export: {reason}; leave the file out")

    def _refuse_doctype(self, *_: Any) -> None:
        raise NotAnExport(f"{self.path} has a DOCTYPE, which MediaWiki exports do not have")

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        name = name.rpartition(" ")[2]
        if not self._elements and name != "mediawiki":
            raise NotAnExport(f"{self.path} is not a MediaWiki export: its first element is {name[:40]}")
        if len(self._elements) > _MAX_DEPTH:
            raise self._refusal(f"it is nested deeper than {_MAX_DEPTH} levels")
        self._is_export = True
        self._elements.append(name)
        if name == "page":
            self._page, self._size, self._redirect = {key: [] for key in _KEPT}, 0, False
        elif name == "redirect":
            self._redirect = True
        elif name == "revision" and self._page:  # the last revision counts
            self._page["text"], self._size = [], 0
        elif name == "namespace":
            self._namespace_key = attributes.get("key", "")

    def _characters(self, data: str) -> None:
        name = self._elements[-1]
        if name == "namespace" and self._namespace_key in _MEDIA_NAMESPACES and len(data) < 100:
            self._media.add(data.strip().lower())
        if name in self._page:
            self._size += len(data)
            if self._size <= self.max_characters:
                self._page[name].append(data)

    def _end(self, _: str) -> None:
        if self._elements.pop() != "page" or not self._page:
            return
        title, namespace, model, text = ("".join(self._page[key]) for key in _KEPT)
        self._page = {}
        if self._redirect:
            self.left_out["redirects"] += 1
        elif namespace.strip() != "0":
            self.left_out["pages of other namespaces"] += 1
        elif model not in ("", "wikitext"):
            self.left_out["pages not in wikitext"] += 1
        elif self._size > self.max_characters:
            self.long_pages.append(f"{self.path}: page {title[:100]!r}")
        else:
            self._ready.append((title, text))


def wiki_text(wikitext: str, media_namespaces: set[str]) -> str:
    """The text of a page: without templates, tables, notes, files and categories; lists and headings line by line.

    ``media_namespaces`` are lower-case prefixes of links to files and categories.

    Raises:
        UserError: mwparserfromhell is not installed.
    """
    with user_errors("reading wikitext needs mwparserfromhell", "install it: pip install 'lmchat[web]'", ImportError):
        import mwparserfromhell
    parts: list[str] = []
    for section in _SECTION.split(wikitext):  # the parser's time and memory grow with the length of its input
        _add_text(mwparserfromhell.parse(section, skip_style_tags=True), media_namespaces, parts)
    lines = [re.sub(r"[ \t]+", " ", line).strip() for line in _MARKS.sub("", "".join(parts)).split("\n")]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).strip()


def _add_text(code: Any, media_namespaces: set[str], parts: list[str]) -> None:
    from mwparserfromhell.nodes import ExternalLink, Heading, HTMLEntity, Tag, Text, Wikilink

    for node in code.nodes if code else ():
        inner = None
        if isinstance(node, Text):
            parts.append(node.value)
        elif isinstance(node, HTMLEntity):
            parts.append(node.normalize())
        elif isinstance(node, Wikilink):
            prefix = str(node.title).partition(":")[0].strip().lower()
            inner = None if prefix in media_namespaces else node.text or node.title
        elif isinstance(node, ExternalLink):
            inner = node.title or (None if node.brackets else node.url)
        elif isinstance(node, Heading):
            inner = node.title
        elif isinstance(node, Tag) and str(node.tag).strip().lower() not in _HIDDEN_TAGS:
            parts.append("\n" if node.tag == "br" else "")
            inner = node.contents
        _add_text(inner, media_namespaces, parts)
