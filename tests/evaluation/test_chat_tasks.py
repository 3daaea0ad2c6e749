"""Multiple-choice answers compared with a separate forward pass of each question."""

from __future__ import annotations

import pytest
import torch

from lmchat.evaluation.chat_tasks import grade
from lmchat.generation.engine import Engine
from lmchat.model.config import GPTConfig
from lmchat.model.gpt import GPT
from lmchat.tasks.base import MultipleChoice, Task, exchange
from lmchat.tokenizer.bpe import Tokenizer
from lmchat.tokenizer.render import render_for_completion
from lmchat.types import Conversation
from random_weights import with_random_weights

TOKENIZER = Tokenizer({bytes([byte]): byte for byte in range(256)})


class Letters(Task, MultipleChoice):
    """Questions of many lengths with three or four letters; an answer is correct if it equals the reference answer."""

    def num_examples(self) -> int:
        return 9

    def example(self, index: int) -> Conversation:
        return exchange("why? " * (1 + 5 * index), "ABCD"[index % 4])

    def letters(self, conversation: Conversation) -> list[str]:
        return list("ABCD" if len(str(conversation)) % 2 else "ABD")

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        return completion == conversation["messages"][-1]["content"]


@pytest.fixture
def model() -> GPT:
    config = GPTConfig(
        sequence_len=64, vocab_size=TOKENIZER.vocab_size, n_layer=2, n_head=2, n_kv_head=1, n_embd=32,
        window_pattern="SL",
    )  # fmt: skip
    return with_random_weights(GPT(config, compute_dtype=torch.float64), 0.3, seed=3)


def alone(model: GPT, task: Letters, conversation: Conversation) -> str:
    """The most likely letter after a question that is evaluated alone."""
    with torch.no_grad():
        logits = model(torch.tensor([render_for_completion(TOKENIZER, conversation)]))[0, -1]
    return max(task.letters(conversation), key=lambda letter: float(logits[TOKENIZER.encode(letter)[0]]))


def test_batching_does_not_change_the_most_probable_letter(model: GPT) -> None:
    task = Letters()
    expected = [alone(model, task, conversation) == conversation["messages"][-1]["content"] for conversation in task]
    assert True in expected and False in expected
    for max_rows in (4, 128):
        assert grade(Engine(model, TOKENIZER, max_rows=max_rows), task, list(task)) == expected
    assert grade(Engine(model, TOKENIZER), task, []) == []


def test_answering_questions_compiles_nothing(model: GPT) -> None:
    """Each length would recompile the blocks, until torch gives up and runs them eagerly."""
    for block in model.blocks:
        block.compile(backend=lambda *_: pytest.fail("a question was compiled"))
    task = Letters()
    assert len(grade(Engine(model, TOKENIZER), task, list(task))) == 9
