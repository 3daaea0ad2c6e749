"""Rows that only fill up a bucket, as on a GPU, do not change answers."""

from __future__ import annotations

import random

import pytest

from live_server import tiny_engine
from lmchat.generation import runner
from lmchat.generation.sampling import SamplingParams


def conversations() -> tuple[list[list[int]], int]:
    """Greedy answers to prompts that often continue earlier ones, and how many tokens were reused."""
    engine, rng = tiny_engine(), random.Random(5)
    load, reused = engine.prefixes.load, []
    engine.prefixes.load = lambda *given: reused.append(load(*given)) or reused[-1]  # type: ignore[method-assign, func-returns-value]
    answers: list[list[int]] = []
    earlier: list[list[int]] = []
    for _ in range(30):
        prompts = []
        for _ in range(rng.randint(1, 5)):
            if earlier and rng.random() < 0.7:
                told = rng.choice(earlier)
                prompts.append([*told[: rng.randint(17, max(17, len(told)))], rng.randrange(256)])
            else:
                prompts.append([256, *(rng.randrange(256) for _ in range(rng.randint(20, 50)))])
        params = [
            SamplingParams(max_new_tokens=rng.randint(1, 30), temperature=0, calculator=False, stop_tokens=[])
            for _ in prompts
        ]
        for prompt, [completion] in zip(prompts, engine.generate(prompts, params), strict=True):
            answers.append(list(completion.ids))
            earlier.append(prompt + answers[-1])
        earlier = [each for each in earlier if len(each) < 150][-12:]
    return answers, sum(length for length, _ in reused)


def test_filling_rows_leave_cached_prefixes_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = conversations()
    read = runner._read
    monkeypatch.setattr(runner.Runner, "bucket", lambda self, rows: min(1 << (rows - 1).bit_length(), 8))
    monkeypatch.setattr(
        runner,
        "_read",
        lambda outputs, rows: runner.StepOutput(*(field[:, :rows] for field in read(outputs, rows))),
    )
    answers, reused = conversations()
    assert reused > 1000
    assert answers == expected
