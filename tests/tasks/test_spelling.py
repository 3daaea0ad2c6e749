from __future__ import annotations

import random
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lmchat.generation.calculator import calculate
from lmchat.tasks.base import in_split
from lmchat.tasks.patterns import expand
from lmchat.tasks.spelling import COUNT_QUESTIONS, SPELL_QUESTIONS, SimpleSpelling, SpellingBee
from lmchat.tasks.words import read_words, words_from_text, write_words
from lmchat.types import UserError


@pytest.fixture(scope="module")
def words_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A thousand made-up words of 3 to 12 letters."""
    rng = random.Random(1)
    words = {"".join(rng.choices("abcdeorst", k=rng.randint(3, 12))) for _ in range(1_000)}
    path = tmp_path_factory.mktemp("words") / "words.txt"
    path.write_text("\n".join(sorted(words)) + "\n")
    return str(path)


def spelled(text: str) -> str:
    """The word of a spelling, joined from its letters."""
    word, letters = text.split(":")
    assert letters.split(",") == list(word)
    return word


def test_train_and_test_words_are_disjoint_and_all_are_used(words_path: str) -> None:
    used = {
        split: {spelled(str(task[i]["messages"][1]["content"])) for i in range(len(task))}
        for split, task in {split: SimpleSpelling(split, words_path=words_path) for split in ("train", "test")}.items()
    }
    assert not used["train"] & used["test"]
    assert used["train"] | used["test"] == set(read_words(words_path))
    assert 0.05 < len(used["test"]) / len(used["train"]) < 0.2


def test_the_split_of_a_word_does_not_depend_on_the_list(words_path: str, tmp_path: Path) -> None:
    half, words = tmp_path / "half.txt", read_words(words_path)[::-2]
    write_words(words, half)
    held_out = set(SimpleSpelling("test", words_path=words_path).words)
    assert set(SimpleSpelling("test", words_path=str(half)).words) == held_out.intersection(words)


def test_both_tasks_hold_out_the_same_words(words_path: str) -> None:
    bee = SpellingBee("test", words_path=words_path)
    simple = SimpleSpelling("train", words_path=words_path)
    assert not set(bee.words) & set(simple.words)


def test_words_repeat_evenly(words_path: str) -> None:
    task = SimpleSpelling("test", size=1_000, words_path=words_path)
    counts = Counter(spelled(str(conversation["messages"][1]["content"])) for conversation in task)
    assert len(counts) == len(task.words)
    assert max(counts.values()) - min(counts.values()) <= 1


def test_the_question_names_the_word_and_the_answer_is_graded(words_path: str) -> None:
    for conversation in SimpleSpelling("test", words_path=words_path):
        question, answer = (str(message["content"]) for message in conversation["messages"])
        word = spelled(answer)
        assert re.search(rf"\b{word}\b", question)
        task = SimpleSpelling(words_path=words_path)
        assert task.evaluate(conversation, answer + "\n")
        assert not task.evaluate(conversation, answer[:-1] + "x")
        assert not task.evaluate(conversation, word)


def test_made_up_words_are_of_the_split_and_of_two_words_of_the_list(words_path: str) -> None:
    words = set(read_words(words_path))
    for split in ("train", "test"):
        task = SimpleSpelling(split, size=1_500, words_path=words_path, made_up=0.5)
        spellings = [spelled(str(conversation["messages"][1]["content"])) for conversation in task]
        new = [word for word in spellings if word not in words]
        assert 0.45 < len(new) / len(spellings) < 0.55
        assert all(in_split(word, split) for word in new)
        for word in new[:50]:
            assert any(
                any(first.startswith(word[:cut]) for first in task.words)
                and any(last[cut:] == word[cut:] for last in task.words)
                for cut in range(1, len(word) + 1)
            )
    with pytest.raises(UserError, match="made_up=2"):
        SimpleSpelling(made_up=2)


def test_both_ways_of_counting_are_correct(words_path: str) -> None:
    task = SpellingBee("train", size=500, words_path=words_path)
    absent = 0
    for conversation in task:
        question, parts = (message["content"] for message in conversation["messages"])
        assert isinstance(parts, list)
        by_hand, call, output, final = (part["text"] for part in parts)
        found = re.fullmatch(r"'(\w+)'\.count\('(\w)'\)", call)
        assert found
        word, letter = found.groups()
        assert word in str(question)
        assert letter in re.sub(rf"\b{word}\b", "", str(question))
        count = sum(character == letter for character in word)
        assert calculate(call) == output == str(count)
        assert final.endswith(f"\n#### {count}")
        assert f"\nI count {count}." in by_hand
        assert spelled(by_hand.splitlines()[1]) == word
        steps = [line for line in by_hand.splitlines() if re.match(r"\d+:", line)]
        assert [line.split(":")[1][0] for line in steps] == list(word)
        assert [int(line.split(":")[0]) for line in steps] == list(range(1, len(word) + 1))
        hits = [int(line.split()[-1]) for line in steps if "that is" in line]
        assert hits == list(range(1, count + 1))
        assert task.reward(conversation, final) == 1.0
        assert task.reward(conversation, f"#### {count + 1}") == 0.0
        assert task.reward(conversation, f"{by_hand} cou {final}") == 0.5
        absent += count == 0
    assert 0 < absent < 100


def test_examples_are_the_same_at_every_call_and_differ_by_seed(words_path: str) -> None:
    def questions(**options: Any) -> list[Any]:
        return [item["messages"][0]["content"] for item in SpellingBee(words_path=words_path, size=50, **options)]

    assert questions() == questions()
    assert questions()[10:40:3] == questions(start=10, stop=40, step=3)
    assert questions() != questions(seed=1)
    # same seed, longer list: the first words are the same
    assert questions() == [SpellingBee(words_path=words_path)[i]["messages"][0]["content"] for i in range(50)]


def test_wordings_do_not_repeat() -> None:
    for patterns in (SPELL_QUESTIONS, COUNT_QUESTIONS):
        wordings = [wording.rstrip("?") for wording in expand(*patterns)]
        assert len(set(wordings)) == len(wordings) >= 200


def test_words_from_text_counts_lower_case_words_only() -> None:
    texts = ["The cat saw a cat, and Anna's cats saw it.", "don't re-do cat3 café cat_x naïve\ncat saw hats hats hats"]
    assert words_from_text(texts, min_count=1) == ["cat", "hats", "saw", "and", "cats"]
    assert words_from_text(texts, min_count=3) == ["cat", "hats", "saw"]
    lengths = ["at", "bat", "b" * 20, "c" * 21, "b" * 20]
    assert words_from_text([" ".join(lengths)], min_count=1) == ["b" * 20, "bat"]


def test_word_files_are_checked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "list.txt"
    path.write_text("Cat\r\ndog\n\n cat \n")
    assert read_words(path) == ["cat", "dog"]
    path.write_text("cat\nit's\nnaïve\n")
    with pytest.raises(UserError, match=r"2 lines are not words.*\"it's\", 'naïve'"):
        read_words(path)
    path.write_text("\n")
    with pytest.raises(UserError, match="contains no words"):
        read_words(path)
    monkeypatch.setenv("LMCHAT_BASE_DIR", str(tmp_path))
    with pytest.raises(UserError, match=r"no word list .*words\.txt; make one"):
        len(SpellingBee())
    assert write_words(["cat"]) == tmp_path / "words.txt"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["list.txt", "words.txt"]
    assert read_words(None) == ["cat"]
    assert len(SimpleSpelling("train")) == 1
    with pytest.raises(UserError, match="no test words"):
        len(SimpleSpelling("test"))
    with pytest.raises(UserError, match="SimpleSpelling: size is 0; it must be at least 1"):
        SimpleSpelling(size=0)


def test_a_real_word_list_is_split_evenly(shared_data: Path) -> None:
    task = SpellingBee(size=80_000, words_path=str(shared_data / "words" / "words_alpha.txt"))
    assert len(task) == 80_000
    assert len(task.words) > 300_000
    assert task[79_999]["messages"][1]["role"] == "assistant"
