"""Generated conversations render to tokens: calculator calls receive loss, their results do not."""

from __future__ import annotations

import json
import random
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest

from lmchat.data.mixture import Mixture, MixturePart, fingerprint
from lmchat.data.padded_batches import PaddedPlan
from lmchat.data.rendered_conversations import render_all
from lmchat.demo.tasks import Arithmetic
from lmchat.tasks import Identity, JSONLConversations, SimpleSpelling, SpellingBee, Task
from lmchat.tasks.base import exchange, reference_answer
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


def test_rendered_conversations_stay_on_the_disk(tokenizer: Tokenizer, tmp_path: Path) -> None:
    conversations = [exchange(f"{number}?", f"{number}!" * (number % 7 + 1)) for number in range(4_000)]
    render_all(conversations[:2], tokenizer, 16, tmp_path, title="")  # imports are not measured
    tracemalloc.start()
    rendered = render_all(conversations, tokenizer, 16, tmp_path, title="")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 100 * len(conversations)
    expected = [render_conversation(tokenizer, conversation) for conversation in conversations]
    for index, (ids, mask) in enumerate(expected):
        found = [array.tolist() for array in rendered[index]]
        assert found == [ids[:16], [bool(bit) for bit in mask[:16]]]
    assert rendered.cut_tokens.tolist() == [max(0, len(ids) - 16) for ids, _ in expected]
    assert rendered.loss_tokens.tolist() == [sum(mask[:16]) for _, mask in expected]
    tokens, cut = sum(len(ids[:16]) for ids, _ in expected), sum(len(ids) > 16 for ids, _ in expected)
    loss = rendered.loss_tokens.sum()
    assert str(rendered).startswith(f"4,000 conversations, {tokens:,} tokens, {loss:,} with loss, {cut:,} truncated, ")


def test_own_conversations_take_few_bytes_each(tokenizer: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "own.jsonl"

    def peak(count: int) -> int:
        path.write_text("".join(json.dumps(exchange(f"{number}?", "Yes.")) + "\n" for number in range(count)))
        tracemalloc.start()
        train, val = (JSONLConversations(str(path), split=split) for split in ("train", "val"))
        val.share_rows(train)
        mixture = Mixture([MixturePart(train, epochs=2)])
        assert len(mixture) == 2 * (count - len(val))
        tracemalloc.reset_peak()  # a fixed amount to read the file
        rendered = render_all(mixture, tokenizer, 64, tmp_path, title="")
        plan = PaddedPlan(rendered, 64, 8)
        fingerprint(mixture, rendered.checksums)
        assert plan.loss_tokens(0) > 0
        held = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return held

    peak(100)  # imports are not measured
    assert (peak(1500) - peak(500)) / 1000 < 100


@pytest.mark.parametrize("seed", [42, None])
def test_a_repeated_conversation_is_rendered_once(
    seed: int | None, tokenizer: Tokenizer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repeated, once = Identity(size=50), Arithmetic(size=20)
    parts = [MixturePart(once), MixturePart(repeated, epochs=3), MixturePart(Identity(size=5, start=5))]
    mixture = Mixture(parts, seed)
    apart = render_all(list(mixture), tokenizer, 48, tmp_path / "apart", title="")
    read = Counter[int]()
    example = Identity.example
    monkeypatch.setattr(Identity, "example", lambda task, index: read.update([index]) or example(task, index))
    together = render_all(mixture, tokenizer, 48, tmp_path / "together", title="")
    assert str(together) == str(apart)
    assert read == dict.fromkeys(range(50), 1)
    for name in ("lengths", "loss_tokens", "cut_tokens", "checksums"):
        assert getattr(together, name).tolist() == getattr(apart, name).tolist(), name
    for index in range(len(mixture)):
        assert [array.tolist() for array in together[index]] == [array.tolist() for array in apart[index]]
