"""pass@k compared with all choices of k samples; its interval compared with resampling the questions."""

from __future__ import annotations

import math
from itertools import combinations
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lmchat.evaluation.intervals import mean_with_interval, wilson_interval
from lmchat.evaluation.pass_at_k import PassAtKEvaluator, pass_at_k
from lmchat.generation.sampling import SamplingParams
from lmchat.tasks.base import Task, exchange
from lmchat.tokenizer.bpe import Tokenizer
from lmchat.types import Conversation

NUM_SAMPLES = 6


@pytest.mark.parametrize("k", range(1, NUM_SAMPLES + 1))
def test_pass_at_k_equals_brute_force_over_choices(k: int) -> None:
    expected = []
    for right in range(NUM_SAMPLES + 1):
        choices = list(combinations([True] * right + [False] * (NUM_SAMPLES - right), k))
        expected.append(sum(map(any, choices)) / len(choices))
    estimate = pass_at_k(torch.arange(NUM_SAMPLES + 1), NUM_SAMPLES, k)
    torch.testing.assert_close(estimate, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-15)


class Letters(Task):
    """The model answers with the letters of the question, one per sample; r is correct."""

    def __init__(self, num_correct: list[int]) -> None:
        super().__init__()
        self.num_correct = num_correct

    def num_examples(self) -> int:
        return len(self.num_correct)

    def example(self, index: int) -> Conversation:
        return exchange("r" * self.num_correct[index] + "w" * (NUM_SAMPLES - self.num_correct[index]), "r")

    def evaluate(self, conversation: Conversation, completion: str) -> bool:
        return completion == "r"

    def reward(self, conversation: Conversation, completion: str) -> float:
        return 0.0


def evaluator_after(task: Letters, batch_size: int, ranks: int = 1) -> PassAtKEvaluator:
    tokenizer = Tokenizer({bytes([byte]): byte for byte in range(256)})

    def generate(prompts: list[list[int]], sampling: SamplingParams) -> Any:
        letters = [[token for token in prompt if token in (*b"rw",)] for prompt in prompts]
        return [[SimpleNamespace(content=[letter]) for letter in each] for each in letters]

    engine = SimpleNamespace(generate=generate, tokenizer=tokenizer)
    net = SimpleNamespace(device=torch.device("cpu"))
    policy: Any = SimpleNamespace(tokenizer=tokenizer, engine=engine, net=net)
    evaluator = PassAtKEvaluator(task, SamplingParams(num_samples=NUM_SAMPLES), batch_size)
    for rank in range(ranks):
        for batch in evaluator.batches(rank, ranks):
            evaluator.update(policy, batch)
    return evaluator


def test_a_rank_without_questions_counts_nothing() -> None:
    assert evaluator_after(Letters([NUM_SAMPLES, 0]), batch_size=1, ranks=3).compute()["pass@1"] == 0.5


def test_questions_have_equal_weight_and_means_intervals() -> None:
    correct = [0, 1, 1, 2, 3, 0, 6, 5] * 4
    evaluator = evaluator_after(Letters(correct), batch_size=5)
    metrics = evaluator.compute()
    rng = np.random.default_rng(7)
    for k in range(1, NUM_SAMPLES + 1):
        values = pass_at_k(torch.tensor(correct), NUM_SAMPLES, k).numpy()
        assert float(metrics[f"pass@{k}"]) == pytest.approx(values.mean(), rel=1e-12)
        expected = wilson_interval(values.sum(), len(values))  # all of 6 samples are wrong, or one is correct: a share
        if k < NUM_SAMPLES:
            means = rng.choice(values, (20_000, len(values))).mean(axis=1)
            expected = tuple(np.quantile(means, [0.025, 0.975]))
        assert evaluator.intervals[f"pass@{k}"] == pytest.approx(expected, abs=0.006)
    again = evaluator.compute()
    assert math.isnan(float(again["pass@1"])), "the counters start again"


def test_a_mean_without_questions_and_one_without_doubt() -> None:
    value, interval = mean_with_interval([0.0, 0.5, 1.0], [0, 0, 0])
    assert math.isnan(value) and interval == (0, 1)
    assert mean_with_interval([0.0, 0.5, 1.0], [9, 0, 0]) == (0, wilson_interval(0, 9))
