"""The engine as on a GPU: few shapes, steps that are replayed, several steps per read, and slots on demand."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch

from lmchat.generation import kv_pool
from lmchat.generation.engine import Engine
from lmchat.generation.kv_pool import KVPool
from lmchat.generation.sampling import SamplingParams
from lmchat.model.config import GPTConfig
from lmchat.model.gpt import GPT
from lmchat.tokenizer.bpe import Tokenizer
from lmchat.types import UserError
from random_weights import with_random_weights
from simulated_graphs import SimulatedGraphs, gpu_engine

TOKENIZER = Tokenizer({bytes([byte]): byte for byte in range(256)})
GREEDY = SamplingParams(max_new_tokens=20, temperature=0, stop_tokens=(), calculator=False)


def network(sequence_len: int = 64) -> GPT:
    config = GPTConfig(
        sequence_len=sequence_len, vocab_size=TOKENIZER.vocab_size, n_layer=3, n_head=4, n_kv_head=2, n_embd=64,
        window_pattern="SL",
    )  # fmt: skip
    return with_random_weights(GPT(config, compute_dtype=torch.float64), 0.15, embeddings=1.0, vectors=1.0)


def random_requests(count: int) -> list[tuple[list[int], SamplingParams, int]]:
    """Prompts that often share a beginning, parameters, and the number of tokens after which each is cancelled."""
    rng = random.Random(count)
    beginnings = [[256, *(rng.randrange(256) for _ in range(rng.randint(1, 90)))] for _ in range(8)]
    requests = []
    for _ in range(count):
        beginning = rng.choice(beginnings)
        prompt = beginning[: rng.randint(1, len(beginning))] + [rng.randrange(256) for _ in range(rng.randint(0, 5))]
        params = SamplingParams(
            num_samples=rng.choice([1, 1, 2, 5]),
            max_new_tokens=rng.randint(1, 50),
            temperature=rng.choice([0, 0.7, 1.5]),
            top_k=rng.choice([None, 1, 3, 7, 50]),
            top_p=rng.choice([None, None, 0.5]),
            seed=rng.randrange(1000),
            logprobs=rng.random() < 0.4,
            top_logprobs=rng.choice([0, 3, 5]),
            stop_tokens=rng.choice([None, (), tuple(rng.sample(range(256), 12))]),
        )
        requests.append((prompt, params, rng.randint(3, 20) if rng.random() < 0.25 else 10**6))
    return requests


def answers(engine: Engine, requests: list[tuple[list[int], SamplingParams, int]]) -> list[dict[int, list[Any]]]:
    """Tokens of each request by sample, with what is told of them; requests arrive while others run."""
    rng, found = random.Random(0), list[dict[int, list[Any]]]()
    while len(found) < len(requests) or engine.scheduler.running or engine.scheduler.num_waiting:
        while len(found) < len(requests) and rng.random() < 0.4:
            prompt, params, _ = requests[len(found)]
            assert engine.add_request(prompt, params) == len(found)
            found.append({})
        for event in engine.step():
            logprob = None if event.logprob is None else pytest.approx(event.logprob, abs=1e-9)
            top = [(token, pytest.approx(value, abs=1e-9)) for token, value in event.top]
            token = (event.token, event.forced, logprob, top, event.finish_reason)
            found[event.request].setdefault(event.sample, []).append(token)
        for request, samples in enumerate(found):
            if sum(map(len, samples.values())) >= requests[request][2]:
                engine.cancel(request)
    return found


@cache
def answers_of_a_cpu() -> tuple[list[tuple[list[int], SamplingParams, int]], GPT, list[dict[int, list[Any]]]]:
    requests, net = random_requests(16), network()
    return requests, net, answers(Engine(net, TOKENIZER, max_rows=8), requests)


@pytest.mark.parametrize("max_bytes", [None, 3_000_000])
def test_answers_are_those_of_a_cpu(max_bytes: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    requests, net, expected = answers_of_a_cpu()
    engine = gpu_engine(monkeypatch, net, TOKENIZER, max_rows=8, max_bytes=max_bytes)
    found = answers(engine, requests)
    for (_, _, cancelled), mine, other in zip(requests, found, expected, strict=True):
        assert cancelled < 10**6 or mine.keys() == other.keys()
        for sample in mine.keys() & other.keys():
            length = min(len(mine[sample]), len(other[sample])) if cancelled < 10**6 else None
            assert mine[sample][:length] == other[sample][:length]
    assert isinstance(engine.runner.graphs, SimulatedGraphs) and engine.runner.graphs.captures > 5


@pytest.mark.parametrize("on_gpu", [False, True])
def test_a_request_with_logits_that_are_not_finite_harms_no_later_one(
    on_gpu: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = network()
    with torch.no_grad():
        net.transformer.wte.weight[7] = float("nan")
    engine = gpu_engine(monkeypatch, net, TOKENIZER) if on_gpu else Engine(net, TOKENIZER)
    expected = engine.generate([[256, 1, 2, 3]], GREEDY)[0][0].ids
    with pytest.raises(UserError, match="not finite"):
        engine.generate([[256, *[1] * 30, 7, *[2] * 20]], GREEDY)
    assert len(engine.scheduler.running) == engine.scheduler.num_waiting == 0
    for _ in range(3):
        assert engine.generate([[256, 1, 2, 3]], GREEDY)[0][0].ids == expected


def test_a_conversation_needs_few_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, conversation = gpu_engine(monkeypatch, network(200), TOKENIZER), [256]
    for turn in range(8):
        conversation += [turn + 1] * 40
        conversation += engine.generate([conversation], GREEDY)[0][0].ids
        assert engine.runner.pool.num_slots == 8


def test_shared_prompts_stay_within_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = gpu_engine(monkeypatch, network(200), TOKENIZER, max_rows=24, max_bytes=3_000_000)
    params = SamplingParams(num_samples=2, max_new_tokens=8, temperature=1, stop_tokens=())
    for number in range(12):
        engine.add_request([256, *[number] * 600], params)
    tokens = 0
    while engine.scheduler.running or engine.scheduler.num_waiting:
        tokens += len(engine.step())
        pools = engine.runner.pool, engine.runner.prompts
        assert sum(each.num_slots * each.layout.slot_bytes(each.capacity) for each in pools) <= 3_000_000
    assert tokens == 12 * 2 * 8


@pytest.mark.parametrize("on_gpu", [False, True])
def test_a_long_shared_prompt_does_not_slow_later_ones(on_gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    net = network(200)
    one_slot = Engine(net, TOKENIZER).runner.layout.slot_bytes(1536)
    options: dict[str, Any] = {"max_rows": 8, "max_bytes": 4 * one_slot}
    engine = gpu_engine(monkeypatch, net, TOKENIZER, **options) if on_gpu else Engine(net, TOKENIZER, **options)
    params = SamplingParams(num_samples=2, max_new_tokens=8, temperature=1, stop_tokens=())

    def steps() -> int:
        for number in range(8):
            engine.add_request([256, *[number] * 40], params)
        count = 0
        while engine.scheduler.running or engine.scheduler.num_waiting:
            engine.step()
            count += 1
        return count

    expected = steps()
    engine.generate([[256, *[3] * 1500]], params)
    assert steps() == expected


def test_groups_follow_a_smaller_number_of_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    net = network(200)
    slot = Engine(net, TOKENIZER).runner.layout.slot_bytes
    budget = max(18 * slot(64), 9 * slot(128))
    engine = gpu_engine(monkeypatch, net, TOKENIZER, max_rows=8, max_bytes=budget)
    params = SamplingParams(num_samples=2, max_new_tokens=12, temperature=1, stop_tokens=())
    requests = [engine.add_request([256, *[number] * 40], params) for number in range(3)]
    for _ in range(2):
        engine.step()
    engine.cancel(requests[2])
    engine.add_request([256, *[9] * 100], params)
    count = 0
    while engine.scheduler.running or engine.scheduler.num_waiting:
        count += len(engine.step())
    assert count >= 24


@contextmanager
def failing_allocation(number: int) -> Iterator[None]:
    """Context manager in which one allocation of slots fails."""
    zeros, count = torch.zeros, 0

    def allocate(*args: Any, **options: Any) -> torch.Tensor:
        nonlocal count
        count += 1
        if count == number:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return zeros(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kv_pool.torch, "zeros", allocate)
        yield


@pytest.mark.parametrize("number", [1, 4])
def test_an_engine_continues_after_a_lack_of_memory(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = gpu_engine(monkeypatch, network(), TOKENIZER)
    expected = engine.generate([[256, 1, 2, 3]], GREEDY)[0][0].ids
    with failing_allocation(number), pytest.raises(torch.OutOfMemoryError):
        engine.generate([[256, *[1] * 300]], GREEDY)
    assert engine.generate([[256, 1, 2, 3]], GREEDY)[0][0].ids == expected


def test_a_pool_that_cannot_grow_keeps_its_slots() -> None:
    engine = Engine(network(), TOKENIZER)
    pool = KVPool(engine.runner.layout, torch.device("cpu"))
    pool.resize(2, 64)
    with torch.inference_mode():
        pool.keys[1][1] = 3
    with failing_allocation(4), pytest.raises(torch.OutOfMemoryError):
        pool.resize(4, 200)
    assert (pool.num_slots, pool.capacity) == (2, 64) and pool.keys[1][1].eq(3).all() and len(pool.keys) == 3


def test_weights_of_an_engine_from_inference_mode_can_be_refreshed() -> None:
    net = network().float()
    net.compute_dtype = torch.bfloat16
    with torch.inference_mode():
        engine = Engine(net, TOKENIZER)
    engine.refresh()
