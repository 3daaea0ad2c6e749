from __future__ import annotations

import re

import pytest

from lmchat.tasks.identity import Identity, mentions, questions, vary
from lmchat.tasks.identity_text import TOPICS
from lmchat.tasks.jsonl import parse_messages
from lmchat.types import Message, UserError


def wording(message: Message) -> str:
    """A question without its case, punctuation and opener."""
    text = str(message["content"]).lower()
    for opener in ("hey, ", "so, ", "hello! ", "okay. ", "one more thing: "):
        text = text.removeprefix(opener)
    return re.sub(r"[?]", "", text)


def asked(task: Identity) -> set[str]:
    return {wording(message) for conversation in task for message in conversation["messages"][::2]}


def test_no_wording_is_in_both_splits() -> None:
    train, test = asked(Identity("train", size=3_000)), asked(Identity("test", size=3_000))
    assert not train & test
    assert len(train | test) == sum(len(topic.questions) for topic in TOPICS.values())


def test_wordings_are_unique() -> None:
    everything = [question.lower().rstrip("?") for topic in TOPICS.values() for question in topic.questions]
    assert len(set(everything)) == len(everything)


def test_each_topic_has_enough_of_both() -> None:
    for topic in TOPICS.values():
        assert len(questions(topic, "train")) >= 8
        assert len(questions(topic, "test")) >= 2
        assert {*questions(topic, "train"), *questions(topic, "test")} == set(topic.questions)


@pytest.mark.parametrize("assistant", ["lmchat", "C-3PO+", "Ünal"])
def test_every_answer_has_the_facts_that_are_asked_for(assistant: str) -> None:
    task = Identity(size=1_500, assistant=assistant, maker="two friends")
    for conversation in task:
        answer = str(conversation["messages"][-1]["content"])
        assert task.evaluate(conversation, answer)
        assert task.reward(conversation, answer.upper()) == 1.0
        assert not task.evaluate(conversation, "I am a banana.")
        assert "{" not in answer
        assert answer[0].isupper() or not answer[0].isalpha()


def test_the_name_is_what_counts() -> None:
    task = Identity(size=500)
    named = [item for item in task if item["facts"] == [["lmchat"]]]  # type: ignore[typeddict-item]
    assert named
    assert not task.evaluate(named[0], "I am lmchatter, a model.")
    assert task.evaluate(named[0], "They call me LMChat!")


def test_whole_words_are_mentioned() -> None:
    assert mentions("No, I'm not", "no")
    assert not mentions("I know nothing", "no")
    assert mentions("my name is C++.", "c++")


def test_conversations_are_valid_repeatable_and_of_one_to_three_turns() -> None:
    task = Identity(size=300)
    for conversation in task:
        assert parse_messages(list(conversation["messages"]))["messages"] == conversation["messages"]
    assert {len(conversation["messages"]) for conversation in task} == {2, 4, 6}
    assert list(task) == list(Identity(size=300))
    assert list(Identity(size=300, start=100, stop=200)) == list(task)[100:200]
    assert list(task) != list(Identity(size=300, seed=1))


def test_varied_questions_keep_their_words() -> None:
    import random

    rng = random.Random(0)
    seen = {vary("Who are you?", rng) for _ in range(200)}
    assert len(seen) > 10
    assert all("who are you" in question.lower() for question in seen)


def test_nameless_assistants_are_refused() -> None:
    for bad in ({"assistant": " "}, {"maker": ""}, {"size": 0}):
        with pytest.raises(UserError, match="identity"):
            Identity(**bad)
