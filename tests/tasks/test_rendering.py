"""Generated conversations render to tokens: calculator calls receive loss, their results do not."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from lmchat.demo.tasks import Arithmetic
from lmchat.tasks import Identity, SimpleSpelling, SpellingBee, Task
from lmchat.tasks.base import reference_answer
from lmchat.tokenizer.bpe import Tokenizer
from lmchat.tokenizer.render import render_conversation, render_for_completion


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> list[Task]:
    rng = random.Random(2)
    path = tmp_path_factory.mktemp("words") / "words.txt"
    path.write_text("".join("".join(rng.choices("abcdeorst", k=rng.randint(3, 12))) + "\n" for _ in range(300)))
    bee, simple = (kind(size=60, words_path=str(path)) for kind in (SpellingBee, SimpleSpelling))
    return [Arithmetic(size=60), Identity(size=60), bee, simple]


@pytest.fixture(scope="module")
def tokenizer(tasks: list[Task]) -> Tokenizer:
    texts = (str(message["content"]) for task in tasks for item in task for message in item["messages"])
    return Tokenizer.train(texts, 400)


def test_every_conversation_renders_with_the_right_mask(tasks: list[Task], tokenizer: Tokenizer) -> None:
    for task in tasks:
        for conversation in task:
            ids, mask = render_conversation(tokenizer, conversation)
            spoken = tokenizer.decode([token for token, learned in zip(ids, mask, strict=True) if learned])
            silent = tokenizer.decode([token for token, learned in zip(ids, mask, strict=True) if not learned])
            for message in conversation["messages"]:
                parts = message["content"]
                if isinstance(parts, str):
                    assert parts in (spoken if message["role"] == "assistant" else silent)
                    continue
                for part in parts:
                    assert part["text"] in (silent if part["type"] == "python_output" else spoken)


def test_a_rendered_answer_earns_the_reward(tasks: list[Task], tokenizer: Tokenizer) -> None:
    for task in tasks:
        for conversation in task:
            ids, _ = render_conversation(tokenizer, conversation)
            prompt = render_for_completion(tokenizer, conversation)
            assert ids[: len(prompt)] == prompt
            answer = tokenizer.decode(ids[len(prompt) : -1])  # without the end of the turn, as the engine returns it
            assert answer.endswith(reference_answer(conversation))
            assert task.reward(conversation, answer) == 1.0


def test_longest_solutions_fit_a_short_row(tasks: list[Task], tokenizer: Tokenizer, tmp_path: Path) -> None:
    lengths = [len(render_conversation(tokenizer, item)[0]) for task in tasks for item in task]
    assert max(lengths) < 512
