"""Generated conversations about the assistant's identity: its name, its maker, what it can and cannot do."""

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

from lmchat.tasks.base import GeneratedTask, Graded, Split, exchange, reward_in_words_of
from lmchat.tasks.patterns import expand
from lmchat.types import Conversation, Message, UserError
from lmchat.yaml_loading import load_package_yaml

TEST_EVERY = 5
"""Every fifth wording of a question is in the test split, except common ones."""
COMMON_SHARE = 0.25
"""Share of training questions drawn from the common ones only."""
MAX_TURNS = 3
OPENERS = ("", "", "", "", "", "", "Hey, ", "So, ", "By the way, ", "Hello! ", "Okay. ", "One more thing: ")
SHORTHAND = {"you": "u", "your": "ur", "are": "r", "please": "pls", "thanks": "thx"}


@dataclass(frozen=True)
class Topic:
    """Questions with the same meaning, and answers that fit each of them.

    Attributes:
        questions: wordings, all different from those of the other topics.
        answers: wordings, each with all the facts.
        facts: groups of alternatives; a correct answer contains one of each group.
        common: the most frequent questions; all are in the training split, and drawn more often than others.
    """

    questions: Sequence[str]
    answers: Sequence[str]
    facts: Sequence[Sequence[str]]
    common: Sequence[str]


_TEXTS = load_package_yaml("lmchat.tasks", "identity.yaml")
TOPICS = {name: Topic(**{**texts, "questions": expand(*texts["questions"])}) for name, texts in _TEXTS.items()}


class IdentityConversation(Conversation):
    """A conversation about the assistant, with the ``facts`` of its last `Topic`."""

    facts: list[list[str]]


class Identity(GeneratedTask, Graded):
    """Conversations of one to three turns about the assistant itself. No wording of a question is in both splits.

    Args:
        split: train or test.
        size: number of conversations; 1,000 ask about each topic at least 100 times, in most wordings.
        assistant: name of the assistant.
        maker: maker of the assistant.
        seed: other seeds give other conversations.
        slice: see `Task`.
    """

    def __init__(
        self,
        split: Split = "train",
        size: int = 1_000,
        assistant: str = "lmchat",
        maker: str = "the lmchat developers",
        seed: int = 0,
        **slice: Any,
    ) -> None:
        super().__init__(split, size, seed, **slice)
        if not assistant.strip() or not maker.strip():
            raise UserError(f"Identity: assistant is '{assistant}' and maker '{maker}'; give both a name")
        self.assistant = assistant
        self.maker = maker

    def example(self, index: int) -> IdentityConversation:
        rng = self.rng(index)
        topics = rng.sample(list(TOPICS.values()), rng.randint(1, MAX_TURNS))
        messages: list[Message] = []
        for topic in topics:
            common = self.split == "train" and rng.random() < COMMON_SHARE
            question = rng.choice(topic.common if common else questions(topic, self.split))
            question = vary(self._fill(question), rng)
            answer = self._fill(rng.choice(topic.answers))
            messages += exchange(question, answer[0].upper() + answer[1:])["messages"]
        facts = [[self._fill(fact) for fact in alternatives] for alternatives in topics[-1].facts]
        return {"messages": messages, "facts": facts}

    def _fill(self, template: str) -> str:
        return template.format(name=self.assistant, maker=self.maker)

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        """Whether the completion has every fact of the correct answer; ignores case."""
        facts = cast(IdentityConversation, conversation)["facts"]
        return all(any(mentions(completion, fact) for fact in alternatives) for alternatives in facts)

    def reward(self, conversation: Conversation, completion: str) -> float:
        """1 for a correct answer in words of the training answers, else less; see `base.reward_in_words_of`."""
        known = (self._fill(answer) for topic in TOPICS.values() for answer in topic.answers)
        return reward_in_words_of(self.evaluate(conversation, completion), completion, *known)


def questions(topic: Topic, split: Split) -> list[str]:
    """The wordings of a topic that belong to a split."""
    test = [question for question in topic.questions if question not in topic.common][TEST_EVERY // 2 :: TEST_EVERY]
    return test if split == "test" else [question for question in topic.questions if question not in test]


def mentions(text: str, words: str) -> bool:
    """Whether ``text`` has ``words`` as whole words; ignores case."""
    return re.search(rf"(?<!\w){re.escape(words)}(?!\w)", text, re.IGNORECASE) is not None


def vary(question: str, rng: random.Random) -> str:
    """Varies a question as users write: with an opener, other punctuation, in lower case or in shorthand."""
    opener = rng.choice(OPENERS) if question.endswith("?") else ""
    if opener.endswith(", "):
        question = question[0].lower() + question[1:]
    question = opener + question
    if rng.random() < 0.2:
        question = question.removesuffix("?") if question.endswith("?") else question + rng.choice(".!")
    if rng.random() < 0.2:
        question = question.lower()
    if rng.random() < 0.1:
        question = shorten(question)
    return question


def shorten(text: str) -> str:
    """The text in chat shorthand: lower case, ``r u`` for ``are you``, no apostrophes."""
    return re.sub(r"\w+", lambda word: SHORTHAND.get(word[0], word[0]), text.lower().replace("'", ""))
