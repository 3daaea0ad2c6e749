"""Text of HTML and WARC files, through the import command's reader."""

from __future__ import annotations

import gzip
import io
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmchat.data.documents import DocumentReader, text_files
from lmchat.data.web_text import decode_page, html_text, warc_texts
from lmchat.types import UserError

pytest.importorskip("selectolax", reason="selectolax is not installed")
warcio_writer = pytest.importorskip("warcio.warcwriter", reason="warcio is not installed")

PAGE = """<!doctype html><html><head><title>Not this</title><style>p { x: y }</style></head><body>
<nav>Home</nav><h1>A  lamp</h1><p>It is <b>very</b> bright,
and <a href="/x">cheap</a>.</p><script>alert("no")</script>
<ul><li>one<li>two</ul><table><tr><td>a</td><td>b</td></tr></table>
<pre>if x:
    y()</pre><p>1 &lt; 2 &amp; caf&eacute;</p></body></html>"""
TEXT = "Home\n\nA lamp\n\nIt is very bright, and cheap.\n\none\n\ntwo\n\na b\n\nif x:\ny()\n\n1 < 2 & café"


def read(path: Path) -> list[str]:
    return list(DocumentReader().read(path))


def test_visible_text_is_read_in_paragraphs(tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(PAGE)
    (tmp_path / "page.htm.gz").write_bytes(gzip.compress(PAGE.encode()))
    found = text_files(tmp_path)
    assert [read(path) for path in found.files] == [[TEXT], [TEXT]]


class Words(HTMLParser):
    """The words of a page, by the standard library's parser."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.feed(html)
        self.close()

    def handle_data(self, data: str) -> None:
        self.words += data.split()


inline = st.recursive(
    st.text("abc de&<>'é", max_size=12).map(lambda text: text.replace("&", "&amp;").replace("<", "&lt;")),
    lambda inner: st.tuples(st.sampled_from(["p", "b", "div", "li", "h2", "span"]), st.lists(inner, max_size=3)).map(
        lambda node: f"<{node[0]}> {' '.join(node[1])} </{node[0]}>"
    ),
    max_leaves=12,
)


@given(inline)
def test_no_word_is_lost(html: str) -> None:
    assert html_text(f"<body>{html}</body>").split() == Words(html).words


@pytest.mark.parametrize("html", ["", "<", "<html></html>", "<body>", "\0", "<div>" * 5000 + "deep"])
def test_files_that_are_not_pages_are_skipped(html: str) -> None:
    assert html_text(html) in ("", "<", "deep", "\ufffd")


@pytest.mark.parametrize(
    ("content", "charset", "text"),
    [
        ("é".encode(), None, "é"),
        ("é".encode("latin-1"), "iso-8859-1", "é"),
        (b'<meta charset="windows-1251">' + "да".encode("cp1251"), None, '<meta charset="windows-1251">да'),
        (b"\xff", "no-such-charset", "\ufffd"),
        ("“да”".encode("cp1252", "ignore"), "iso-8859-1", "“”"),
        (
            ("Съешь ещё этих мягких французских булок. " * 3).encode("koi8-r"),
            None,
            "Съешь ещё этих мягких французских булок. " * 3,
        ),
    ],
)
def test_encodings(content: bytes, charset: str | None, text: str) -> None:
    assert decode_page(content, charset) == text


@pytest.mark.parametrize("compressed", [False, True])
def test_warc(tmp_path: Path, compressed: bool) -> None:
    from warcio.statusandheaders import StatusAndHeaders

    path = tmp_path / ("crawl.warc.wet.gz" if compressed else "crawl.warc")
    with path.open("wb") as file:
        writer = warcio_writer.WARCWriter(file, gzip=compressed)

        def response(kind: str, body: bytes) -> None:
            headers = StatusAndHeaders("200 OK", [("Content-Type", kind)], protocol="HTTP/1.0")
            writer.write_record(
                writer.create_warc_record("http://x/", "response", payload=io.BytesIO(body), http_headers=headers)
            )

        response("text/html; charset=iso-8859-1", "<p>caf\xe9</p>".encode("latin-1"))
        response("image/png", b"\x89PNG")
        writer.write_record(
            writer.create_warc_record(
                "http://y/", "conversion", payload=io.BytesIO(b"plain text"), warc_content_type="text/plain"
            )
        )
        response("text/html", PAGE.encode())
    assert [read(found) for found in text_files(tmp_path).files] == [["café", "plain text", TEXT]]


def test_a_damaged_warc_file_is_reported(tmp_path: Path) -> None:
    no_address = b"WARC/1.0\r\nWARC-Type: response\r\nContent-Length: 4\r\n\r\nbody\r\n\r\n"
    for content in (b"not a warc file\n\n", no_address):
        (tmp_path / "bad.warc").write_bytes(content)
        with pytest.raises(UserError, match=r"bad\.warc"):
            read(tmp_path / "bad.warc")


@pytest.mark.parametrize("line", [b"a" * 1000, b"Name: value\r\n"])
@pytest.mark.parametrize("within_page", [False, True])
def test_headers_of_a_warc_record_are_bounded(tmp_path: Path, line: bytes, within_page: bool) -> None:
    """One long line, or many lines; also where the record claims to be as long."""
    head = b"WARC/1.0\r\n"
    if within_page:
        head += b"WARC-Type: response\r\nContent-Type: application/http\r\nContent-Length: 99999999\r\n"
        head += b"WARC-Target-URI: http://x/\r\n\r\n"
        head += b"HTTP/1.1 200 OK\r\n"
    path = tmp_path / "a.warc"
    path.write_bytes(head + line * (20_000_000 // len(line)))
    with path.open("rb") as file:
        with pytest.raises(UserError, match=r"a\.warc .*a record has 4,194,304 bytes of headers"):
            next(warc_texts(file, path, 10_000_000))
        assert file.tell() < 6_000_000


@pytest.mark.parametrize(("suffix", "module"), [("html", "selectolax.lexbor"), ("warc", "warcio.archiveiterator")])
def test_a_missing_library_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    (tmp_path / f"page.{suffix}").write_text("<p>x")
    with pytest.raises(UserError, match=r"pip install 'lmchat\[web\]'"):
        read(tmp_path / f"page.{suffix}")
