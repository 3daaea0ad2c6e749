from __future__ import annotations

import re
from inspect import cleandoc

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lmchat.demo.prose import paragraphs


def prose(text: str) -> list[str]:
    return list(paragraphs(text))


def test_only_sentences_of_a_numpy_docstring_are_kept() -> None:
    docstring = """Return the values of an array that are not in another one.

    The result is sorted, and each value is in it only once::

        unique = set_difference(a, b)

    Parameters
    ----------
    a : array_like
        The values to choose from, in any order and of any shape.
    assume_unique : bool, optional
        If True, both arrays are assumed to be free of duplicates,
        which is faster.

    Notes
    -----
    .. math:: |A| - |A \\cap B|

    .. versionadded:: 1.7

    >>> set_difference([1, 2], [2])
    array([1]) is what you get from this

    .. [1] A. Author, "The sets that we have to know about", 1999.
    """
    assert prose(cleandoc(docstring)) == [
        "Return the values of an array that are not in another one.",
        "The values to choose from, in any order and of any shape.",
        "If True, both arrays are assumed to be free of duplicates, which is faster.",
    ]


def test_a_google_docstring_gives_one_line_per_argument() -> None:
    docstring = """Opens a file that was written by this class.

        Args:
            path (str or Path): Where the file is to be found, which may
                be on another machine.
            mode: How the file is to be opened.

        Returns:
            The open file, which the caller has to close.
        """
    assert prose(cleandoc(docstring)) == [
        "Opens a file that was written by this class.",
        "Where the file is to be found, which may be on another machine.",
        "How the file is to be opened.",
        "The open file, which the caller has to close.",
    ]


@pytest.mark.parametrize(
    ("marked", "plain"),
    [
        ("see :func:`~os.path.join` for all of the details", "See os.path.join for all of the details."),
        ("* this is **not** the way in which `it` was meant", "This is not the way in which it was meant."),
        ("The [guide](http://a.b/c) is for those who want more.", "The guide is for those who want more."),
        ("The `guide <http://a.b/c>`_ is for those who want more [1]_.", "The guide is for those who want more."),
        (".. note:: This is for all who use it.", "This is for all who use it."),
        ("It’s “the” one – as you can see…", 'It\'s "the" one - as you can see...'),
        ("Note: this is not a field but a sentence.", "Note: this is not a field but a sentence."),
    ],
)
def test_markup_is_removed(marked: str, plain: str) -> None:
    assert prose(marked) == [plain]


@pytest.mark.parametrize(
    "text",
    [
        "for name in names: print(name, end='') or do_it(x[0], y={})",
        "| this is | a table of the | words that we have |",
        "```\nthis is in a fence and so it is not to be kept\n```",
        "This software is provided as is, without warranty of any kind to you.",
        "How this is to be done\n======================",
        "alpha beta gamma delta epsilon zeta eta theta",
        "Is it?",
        "Это текст, который не на английском языке, а на русском.",
    ],
)
def test_text_that_is_not_prose_is_left_out(text: str) -> None:
    assert prose(text) == []


@given(st.text(alphabet=st.sampled_from("aZ the of. :`*_>()[]\n\t-=#0|'\"\\"), max_size=300))
def test_any_text_gives_clean_lines(text: str) -> None:
    for line in paragraphs(cleandoc(text)):
        assert line.isascii() and "\n" not in line and line == line.strip()
        assert re.search(r"[.!?][\"')]?$", line)
        assert not re.search(r"[{}\[\]`<>|]", line)
