"""The tables of docs/performance.md equal those of the memory model and the closed forms."""

from __future__ import annotations

import make_performance_tables as page
from lmchat.training_memory import training_memory


def test_the_page_is_up_to_date() -> None:
    text = page.PAGE.read_text()
    assert page.fill(text) == text, "run python docs/make_performance_tables.py"
    assert all(table in text for table in page.tables().values())


def test_the_largest_depth_fits_and_the_next_does_not() -> None:
    for gigabytes in page.CARDS_GB:
        depth = page.largest_depth(gigabytes * 1e9, rows=1)
        fits = [training_memory(page.config_of(each), 1).total <= gigabytes * 1e9 for each in (depth, depth + 2)]
        assert fits == [True, False]
