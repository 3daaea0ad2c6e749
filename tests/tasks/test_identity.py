from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

import pytest

from lmchat.tasks.conversation_formats import convert
from lmchat.tasks.identity import OPENERS, SHORTHAND, TOPICS, Identity, mentions, questions, shorten, vary
from lmchat.types import UserError


def named(question: str) -> str:
    """A question of a topic, as asked."""
    return question.format(name="lmchat")


def wording(text: str) -> str:
    """A question without its case, punctuation, opener and shorthand."""
    text = re.sub("[?']", "", text.lower())
    for opener in filter(None, OPENERS):
        text = text.removeprefix(opener.lower())
    longhand = {short: word for word, short in SHORTHAND.items()}
    return re.sub(r"\w+", lambda word: longhand.get(word[0], word[0]), text.rstrip(".!"))


def asked(task: Identity) -> set[str]:
    return {wording(str(message["content"])) for conversation in task for message in conversation["messages"][::2]}


def openings(texts: Iterable[str]) -> Counter[str]:
    """Number of texts by their first two words."""
    return Counter(" ".join(text.split()[:2]) for text in texts)


def test_no_wording_is_in_both_splits() -> None:
    train, test = asked(Identity("train", size=6_500)), asked(Identity("test", size=2_000))
    assert not train & test
    assert train | test == {wording(named(question)) for topic in TOPICS.values() for question in topic.questions}


def test_wordings_are_unique() -> None:
    everything = [re.sub(r"\W", "", question.lower()) for topic in TOPICS.values() for question in topic.questions]
    assert len(set(everything)) == len(everything)


def test_wordings_are_sentences() -> None:
    for topic in TOPICS.values():
        for question in topic.questions:
            assert question[0].isupper()
            assert re.fullmatch(r"[\w,'-]+( [\w,'-]+)*[?]?", named(question)), question


def test_only_questions_have_question_marks() -> None:
    for name in TOPICS.keys() - {"farewell", "greeting", "thanks"}:
        for question in TOPICS[name].questions:
            if re.match(r"Wh|How|(Is|Are|Am|Do|Did|Have|Can|Could|Would|Should|Will|May|In|By)\b", question):
                assert question.endswith("?"), question
            else:
                assert not question.endswith("?") or not re.match("Tell|Please|I |Let|Describe|Explain|Say", question)


def test_each_topic_has_enough_questions_and_answers() -> None:
    for topic in TOPICS.values():
        train, test = questions(topic, "train"), questions(topic, "test")
        assert len(train) >= 48
        assert len(test) >= 12
        assert len(test) == round((len(topic.questions) - len(topic.common)) / 5)
        assert set(topic.common) <= set(train)
        assert {*train, *test} == set(topic.questions)
    assert all(len(TOPICS[name].questions) >= 90 for name in ("name", "maker", "nature"))


def test_both_splits_have_the_same_patterns() -> None:
    for topic in TOPICS.values():
        test = openings(questions(topic, "test"))
        for opening, count in openings(topic.questions).items():
            if count >= 8:
                assert 0.1 <= test[opening] / count <= 0.34, opening


def test_most_test_wordings_consist_of_words_of_training_wordings() -> None:
    for name, topic in TOPICS.items():
        known = {word for question in questions(topic, "train") for word in wording(question).split()}
        test = [wording(question).split() for question in questions(topic, "test")]
        assert sum(known.issuperset(words) for words in test) >= 0.75 * len(test), name


def test_the_first_words_of_an_answer_belong_to_its_topic_alone() -> None:
    starts = [opening for topic in TOPICS.values() for opening in openings(topic.answers)]
    assert len(set(starts)) == len(starts)
    assert all(3 <= len(topic.answers) <= 5 for topic in TOPICS.values())


@pytest.mark.parametrize("assistant", ["lmchat", "C-3PO+", "Ünal"])
def test_every_answer_has_the_facts_that_are_asked_for(assistant: str) -> None:
    task = Identity(size=500, assistant=assistant, maker="two friends")
    for conversation in task:
        answer = str(conversation["messages"][-1]["content"])
        assert task.evaluate(conversation, answer)
        assert task.reward(conversation, answer.upper()) == 1.0
        assert not task.evaluate(conversation, "I am a banana.")
        assert "{" not in answer
        assert answer[0].isupper() or not answer[0].isalpha()


def test_the_name_is_graded() -> None:
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
        assert convert(list(conversation["messages"])).conversation == {"messages": conversation["messages"]}
    assert {len(conversation["messages"]) for conversation in task} == {2, 4, 6}
    assert list(task) == list(Identity(size=300))
    assert list(Identity(size=300, start=100, stop=200)) == list(task)[100:200]
    assert list(task) != list(Identity(size=300, seed=1))


def test_varied_questions_keep_their_words() -> None:
    import random

    rng = random.Random(0)
    seen = {vary("Who are you?", rng) for _ in range(400)}
    assert len(seen) > 20
    assert {wording(question) for question in seen} == {"who are you"}
    assert {"Who are you?", "who are you", "who r u?", "So, who are you?"} <= seen
    stated = {vary("Tell me your name", rng) for _ in range(400)}
    assert {wording(sentence) for sentence in stated} == {"tell me your name"}
    assert {"Tell me your name.", "Tell me your name!", "tell me ur name"} <= stated


def test_rewards_are_for_right_answers_without_other_words() -> None:
    for conversation in Identity("test", size=200, assistant="Ada", maker="Bea"):
        answer = str(conversation["messages"][-1]["content"])
        task = Identity("test", assistant="Ada", maker="Bea")
        assert task.reward(conversation, answer) == 1.0
        assert task.evaluate(conversation, f"{answer}\n#### 1")
        assert task.reward(conversation, f"{answer}\n#### 1") == 0.5
        assert task.reward(conversation, "") == 0.0


def test_shorthand_replaces_whole_words() -> None:
    assert shorten("What's your name, are you Yoursef?") == "whats ur name, r u yoursef?"


def test_nameless_assistants_are_refused() -> None:
    for bad in ({"assistant": " "}, {"maker": ""}, {"size": 0}):
        with pytest.raises(UserError, match="Identity: "):
            Identity(**bad)


def test_a_thousand_conversations_cover_the_topics_evenly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lmchat.tasks.identity.vary", lambda question, rng: question)
    topic_of = {named(question): name for name, topic in TOPICS.items() for question in questions(topic, "train")}
    counts = Counter(str(message["content"]) for row in Identity(size=1000) for message in row["messages"][::2])
    per_topic = Counter(topic_of[question] for question in counts.elements())
    assert per_topic.keys() == TOPICS.keys()
    assert min(per_topic.values()) >= 100
    assert max(per_topic.values()) < 150
    assert len(counts) > 0.7 * len(topic_of)
    common = sum(counts[named(question)] for topic in TOPICS.values() for question in topic.common)
    assert 0.25 < common / counts.total() < 0.32
