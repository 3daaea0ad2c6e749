"""Counts by script compared with sentences of known scripts."""

from __future__ import annotations

import unicodedata

import pytest

from lmchat.tokenizer.bpe import Tokenizer
from lmchat.tokenizer.compression import count_scripts, script_table

SENTENCES = {
    "Latin": "The lamp is on the table, naïve as it may be. ",
    "Cyrillic": "Лампа стоит на столе, и она горит. ",
    "Greek": "Η λάμπα είναι πάνω στο τραπέζι. ",
    "Arabic": "المصباح على الطاولة وهو مضاء. ",
    "Devanagari": "दीपक मेज़ पर रखा है और जल रहा है। ",
    "Han": "灯在桌子上，它亮着。 ",
}


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    """A tokenizer that has seen Latin and Cyrillic only."""
    return Tokenizer.train([(SENTENCES["Latin"] + SENTENCES["Cyrillic"]) * 20], 325)


def test_each_script_has_its_sentences(trained: Tokenizer) -> None:
    text = "".join(SENTENCES.values()) * 2
    counts = count_scripts(trained, text)
    assert counts.keys() == SENTENCES.keys()
    for script, sentence in SENTENCES.items():
        count = counts[script]
        assert (count.characters, count.n_bytes) == (2 * len(sentence), 2 * len(sentence.encode()))
        assert count.tokens == 2 * len(trained.encode(sentence))
    assert list(counts.values()) == sorted(counts.values(), key=lambda count: -count.characters)


def test_scripts_missing_in_training_compress_badly(trained: Tokenizer) -> None:
    counts = count_scripts(trained, "".join(SENTENCES.values()))
    assert [script for script, count in counts.items() if count.is_poor] == [
        script for script in counts if script not in ("Latin", "Cyrillic")
    ]
    assert script_table(counts).row_count == len(SENTENCES)


def test_characters_of_a_script_match_unicode_names(trained: Tokenizer) -> None:
    names = {"Latin": "LATIN", "Cyrillic": "CYRILLIC", "Greek": "GREEK", "Arabic": "ARABIC", "Han": "CJK UNIFIED"}
    letters = [chr(code) for code in range(0x250) if unicodedata.category(chr(code)) in ("Lu", "Ll")]
    letters += [
        letter for sentence in SENTENCES.values() for letter in sentence if unicodedata.category(letter) == "Lo"
    ]
    for letter in letters:
        script = next(iter(count_scripts(trained, letter)), None)
        named = [each for each, prefix in names.items() if unicodedata.name(letter).startswith(prefix)]
        if script in names or named:
            assert [script] == named


def test_text_without_letters_has_no_script(trained: Tokenizer) -> None:
    assert count_scripts(trained, " 12, 34! \n") == {}
