"""Text of MediaWiki exports, through the import command's reader."""

from __future__ import annotations

import bz2
import gzip
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from xml.sax.saxutils import escape

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmchat.data.documents import NOT_AN_EXPORT, TOO_LONG, DocumentReader, text_files
from lmchat.data.import_text import import_folder
from lmchat.data.wiki_text import MAX_PAGE_CHARACTERS, wiki_text
from lmchat.types import UserError

pytest.importorskip("mwparserfromhell", reason="mwparserfromhell is not installed")

SITE = """<siteinfo><sitename>Wikipedia</sitename><namespaces><namespace key="0" />
<namespace key="1">Diskussion</namespace><namespace key="6">Datei</namespace><namespace key="14">Kategorie</namespace>
</namespaces></siteinfo>"""
WIKITEXT = """{{Infobox|a=b|c={{x}}}}<!-- no -->
'''Lamp''' is a ''bright''<ref>[http://x y]</ref> thing in [[Town|the town]] &amp; [[City]]s.
[[Datei:a.jpg|mini|A [[cat]]]]
== Use ==
* one
* two
{| class="wikitable"
! no
|-
| table
|}
<math>x^2</math> <nowiki>[[x]]</nowiki> [https://e.com link] [https://e.org] https://bare.org __NOTOC__
[[Kategorie:Z]] [[:Kategorie:Lamps]]"""
TEXT = """Lamp is a bright thing in the town & Citys.

Use
one
two

[[x]] link https://bare.org
:Kategorie:Lamps"""


def page(title: str, text: str, namespace: int = 0, extra: str = "") -> str:
    revision = f'<revision><id>2</id><model>wikitext</model><text xml:space="preserve">{escape(text)}</text></revision>'
    return f"<page><title>{title}</title><ns>{namespace}</ns><id>1</id>{extra}{revision}</page>"


def export(*pages: str) -> str:
    root = '<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" version="0.11" xml:lang="de">'
    return f"{root}{SITE}{''.join(pages)}</mediawiki>"


def read(path: Path, **options: int) -> tuple[list[str], DocumentReader]:
    reader = DocumentReader(**options)
    return list(reader.read(path)), reader


@pytest.mark.parametrize(
    ("name", "compress"),
    [
        ("dewiki-pages-articles.xml", bytes),
        ("dewiki-pages-articles.xml.bz2", bz2.compress),
        ("dewiki-20260101-pages-articles1.xml-p1p297012.bz2", bz2.compress),
        ("dump.xml.gz", gzip.compress),
    ],
)
def test_articles_are_read_and_the_rest_is_counted(
    tmp_path: Path, name: str, compress: Callable[[bytes], bytes]
) -> None:
    old = "<revision><text>old</text></revision>"
    dump = export(
        page("Lampe", WIKITEXT, extra=old),
        page("Licht", "#REDIRECT [[Lampe]]", extra='<redirect title="Lampe" />'),
        page("Diskussion:Lampe", "talk", namespace=1),
        page("data", "{}").replace("wikitext", "json"),
        page("Größe", "eins"),
    )
    (tmp_path / name).write_bytes(compress(dump.encode()))
    [path] = text_files(tmp_path).files
    texts, reader = read(path)
    assert texts == [f"Lampe\n\n{TEXT}", "Größe\n\neins"]
    assert reader.left_out_pages == {"redirects": 1, "pages of other namespaces": 1, "pages not in wikitext": 1}


def test_the_report_counts_what_is_left_out(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    redirect = page("Licht", "", extra='<redirect title="Lampe" />')
    long = page("Long", "x" * 51)
    (tmp_path / "in" / "dump.xml").write_text(export(page("A", "a"), page("B", "b"), redirect, long))
    (tmp_path / "in" / "feed.xml").write_text("<rss><item>no</item></rss>")
    (tmp_path / "in" / "empty.xml").touch()
    shown = str(import_folder(tmp_path / "in", tmp_path / "out", max_document_characters=50))
    assert "1 documents for training" in shown and "  1 redirects" in shown
    assert f"{TOO_LONG}: {tmp_path / 'in' / 'dump.xml'}: page 'Long'" in shown
    assert f"{NOT_AN_EXPORT}: {tmp_path / 'in' / 'feed.xml'}" in shown and "empty.xml" in shown


BOMB = '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa"><!ENTITY b "&a;&a;&a;&a;">]>'


@pytest.mark.parametrize(
    "xml",
    ["", "text", "<html/>", BOMB + export(page("A", "&b;")), '<!DOCTYPE x SYSTEM "file:///etc/passwd"><mediawiki/>'],
)
def test_other_xml_is_left_out(tmp_path: Path, xml: str) -> None:
    (tmp_path / "a.xml").write_text(xml)
    texts, reader = read(tmp_path / "a.xml")
    assert (texts, reader.left_out[NOT_AN_EXPORT]) == ([], [str(tmp_path / "a.xml")])


@pytest.mark.parametrize(
    ("xml", "message"),
    [
        (export(page("A", "a"))[:-20], r"a\.xml is damaged or truncated \(unclosed token"),
        (export(page("A", "a")).replace("</title>", "</titel>"), r"a\.xml is damaged or truncated \(mismatched tag"),
        (export(page("A", "a")).replace("<id>", "<id>&undefined;"), r"a\.xml is damaged or truncated"),
        ("<mediawiki>" + "<a>" * 100, "nested deeper than 20 levels"),
        (f'<mediawiki><page a="{"x" * 3_000_000}"/></mediawiki>', "a tag longer than 1,048,576 bytes"),
    ],
)
def test_damaged_exports_are_reported(tmp_path: Path, xml: str, message: str) -> None:
    (tmp_path / "a.xml").write_text(xml)
    with pytest.raises(UserError, match=message):
        read(tmp_path / "a.xml")


@pytest.mark.parametrize("damage", [lambda data: data[:-30], lambda data: data[:60] + b"\0" * 20 + data[80:]])
def test_damaged_bz2_is_reported(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    (tmp_path / "a.xml.bz2").write_bytes(damage(bz2.compress(export(page("A", "a")).encode())))
    with pytest.raises(UserError, match=r"a\.xml\.bz2"):
        read(tmp_path / "a.xml.bz2")


def test_memory_is_bounded(tmp_path: Path) -> None:
    """A page of a hundred times the limit is skipped without loading it."""
    with gzip.open(tmp_path / "a.xml.gz", "wt", compresslevel=1) as file:
        before, after = export(page("Huge", "@"), page("A", "a")).split("@")
        file.write(before)
        for _ in range(100):
            file.write("x" * 500_000)
        file.write(after)
    tracemalloc.start()
    texts, reader = read(tmp_path / "a.xml.gz", max_characters=500_000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert texts == ["A\n\na"] and len(reader.left_out[TOO_LONG]) == 1
    assert peak < 20_000_000 < 100 * 500_000
    assert MAX_PAGE_CHARACTERS < 1e7


@given(st.text(st.sampled_from("[]{}|='<>ref/b \n*#:!-&;aé"), max_size=60))
def test_any_wikitext_gives_text(text: str) -> None:
    assert isinstance(wiki_text(text, {"file"}), str)


def test_a_missing_library_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mwparserfromhell", None)
    (tmp_path / "a.xml").write_text(export(page("A", "a")))
    with pytest.raises(UserError, match=r"pip install 'lmchat\[web\]'"):
        read(tmp_path / "a.xml")
