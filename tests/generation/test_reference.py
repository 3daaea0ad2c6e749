"""The engine compared with the reference engine, token by token, on random requests."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

import reference_engine
from lmchat.generation import sequence
from lmchat.generation.engine import Engine
from lmchat.generation.sampling import SamplingParams
from lmchat.model.config import GPTConfig
from lmchat.model.gpt import GPT
from lmchat.tokenizer.bpe import Tokenizer
from random_weights import with_random_weights

TOKENIZER = Tokenizer({bytes([byte]): byte for byte in range(256)})


@cache
def model() -> GPT:
    """A tiny network in fp32 that often stops, and often begins and ends calls of the calculator."""
    config = GPTConfig(
        sequence_len=24, vocab_size=TOKENIZER.vocab_size, n_layer=3, n_head=4, n_kv_head=2, n_embd=32,
        window_pattern="SL",
    )  # fmt: skip
    net = with_random_weights(GPT(config, compute_dtype=torch.float32), 0.15, embeddings=1.0, vectors=1.0)
    with torch.no_grad():
        net.lm_head.weight[[TOKENIZER.special(name) for name in ("python_start", "python_end")]] *= 6
    return net


@pytest.fixture(scope="module", autouse=True)
def answered_calls() -> Iterator[None]:
    """Two thirds of the calls have an answer: random text is no expression."""
    answers: list[str | None] = []

    def calculate(expression: str) -> str | None:
        answers.append(str(len(expression)) if len(expression) % 3 != 1 else None)
        return answers[-1]

    with pytest.MonkeyPatch.context() as monkeypatch:
        for module in (sequence, reference_engine):
            monkeypatch.setattr(module, "calculate", calculate)
        yield
    assert None in answers and any(answers), "calls with and without an answer"


prompts = st.lists(st.integers(0, TOKENIZER.vocab_size - 1), min_size=1, max_size=60)
params = st.builds(
    dict,
    num_samples=st.integers(1, 4),
    max_new_tokens=st.integers(1, 40),
    temperature=st.sampled_from([0.0, 0.7, 1.0, 1.5]),
    top_k=st.sampled_from([None, 1, 5, 50]),
    seed=st.integers(0, 2**40),
    stop_tokens=st.sampled_from([None, (), tuple(range(20)), (65, 258)]),
    calculator=st.booleans(),
)


def expected_ids(prompt: list[int], options: dict[str, Any]) -> list[tuple[list[int], list[int], bool]]:
    """The reference engine's samples of one prompt alone."""
    [samples] = reference_engine.Engine(model(), TOKENIZER).generate([prompt], **options)
    return [(sample.ids, sample.mask, sample.finished) for sample in samples]


# Shrinking costs minutes, since every attempt generates.
QUICK = settings(deadline=None, max_examples=10, derandomize=True, phases=[Phase.explicit, Phase.generate])


@QUICK
@given(st.lists(st.tuples(prompts, params), min_size=1, max_size=6), st.integers(1, 12))
def test_mixed_requests_in_one_batch(requests: list[tuple[list[int], dict[str, Any]]], max_rows: int) -> None:
    engine = Engine(model(), TOKENIZER, max_rows=max_rows)
    answers = engine.generate([prompt for prompt, _ in requests], [SamplingParams(**each) for _, each in requests])
    for (prompt, options), samples in zip(requests, answers, strict=True):
        assert [(sample.ids, sample.mask, sample.finished) for sample in samples] == expected_ids(prompt, options)


@QUICK
@given(st.data())
def test_requests_that_arrive_and_finish_at_different_times(data: st.DataObject) -> None:
    """Requests arrive while others run; some share a prefix with an earlier one, some are cancelled."""
    engine = Engine(model(), TOKENIZER, max_rows=data.draw(st.integers(1, 6)))
    requests: dict[int, tuple[list[int], dict[str, Any]]] = {}
    yielded: dict[tuple[int, int], list[int]] = {}
    reasons: dict[tuple[int, int], str | None] = {}
    cancelled: set[int] = set()
    arrivals, known = data.draw(st.integers(1, 7)), [[65] * 20]
    while arrivals or len(reasons) < sum(options["num_samples"] for _, options in requests.values()):
        if arrivals and (data.draw(st.booleans()) or not (engine.scheduler.running or engine.scheduler.num_waiting)):
            begin = data.draw(st.sampled_from(known)) if data.draw(st.booleans()) else []
            prompt = [*begin, *data.draw(prompts)][:150]
            options = data.draw(params)
            requests[engine.add_request(prompt, SamplingParams(**options))] = prompt, options
            known.append(prompt)
            arrivals -= 1
        for event in engine.step():
            place = event.request, event.sample
            assert place not in reasons and event.request not in cancelled
            yielded.setdefault(place, []).append(event.token)
            if event.finish_reason:
                reasons[place] = event.finish_reason
                if len(yielded[place]) > 16:
                    known.append([*requests[event.request][0], *yielded[place]])
        if data.draw(st.integers(0, 19)) == 0 and requests:
            victim = data.draw(st.sampled_from(sorted(requests)))
            engine.cancel(victim)
            cancelled.add(victim)
            for sample in range(requests[victim][1]["num_samples"]):
                reasons.setdefault((victim, sample), None)
    assert len(engine.scheduler.running) == engine.scheduler.num_waiting == 0 and not engine.step()
    for request, (prompt, options) in requests.items():
        for sample, (ids, _, finished) in enumerate(expected_ids(prompt, options)):
            place = request, sample
            got = yielded.get(place, [])
            if reasons[place] is None:
                assert got == ids[: len(got)]
            else:
                assert (got, reasons[place]) == (ids, "stop" if finished else "length")
