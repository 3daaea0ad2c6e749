"""Random requests that arrive and are cancelled: none is lost or mixed up, and no memory leaks."""

from __future__ import annotations

import gc
import random
import resource
from array import array

import pytest
import torch

from lmchat.generation.engine import Engine
from lmchat.generation.sampling import SamplingParams
from lmchat.model.config import GPTConfig
from lmchat.model.gpt import GPT
from lmchat.tokenizer.bpe import Tokenizer
from lmchat.types import UserError
from random_weights import with_random_weights

TOKENIZER = Tokenizer({bytes([byte]): byte for byte in range(256)})
ABSURD = [
    {"max_new_tokens": 0}, {"max_new_tokens": 10**9}, {"temperature": -1.0}, {"temperature": float("nan")},
    {"top_k": 0}, {"top_p": 2.0}, {"seed": -1}, {"num_samples": 0},
]  # fmt: skip


def _engine() -> Engine:
    config = GPTConfig(
        sequence_len=32, vocab_size=TOKENIZER.vocab_size, n_layer=2, n_head=2, n_kv_head=1, n_embd=32,
        window_pattern="SL",
    )  # fmt: skip
    net = with_random_weights(GPT(config), 0.2, embeddings=1.0)
    return Engine(net, TOKENIZER, max_rows=16, max_bytes=3_000_000)


def _random_request(rng: random.Random) -> tuple[list[int], dict[str, object]]:
    length = rng.choice([1, 2, 10, 40, 120])
    prompt = [rng.randrange(TOKENIZER.vocab_size) for _ in range(length)]
    if rng.random() < 0.3:
        prompt = [66] * 20 + prompt
    options: dict[str, object] = {
        "num_samples": rng.choice([1, 1, 1, 2, 5]),
        "max_new_tokens": rng.choice([1, 3, 10, 30]),
        "temperature": rng.choice([0.0, 0.7, 1.0, 1e-300]),
        "top_k": rng.choice([None, 1, 7, 50, 10**6]),
        "top_p": rng.choice([None, None, 0.9, 1e-9]),
        "seed": rng.randrange(2**62),
        "calculator": rng.random() < 0.5,
    }
    return prompt, options


def _tensor_bytes() -> int:
    """Bytes of all live tensors, except packed weights, whose size is unknown."""
    gc.collect()
    tensors = [each for each in gc.get_objects() if type(each) is torch.Tensor and each.layout is torch.strided]
    return sum(each.untyped_storage().nbytes() for each in tensors)


@pytest.mark.parametrize("count", [100, pytest.param(10_000, marks=pytest.mark.slow)])
@pytest.mark.timeout(3000)
def test_random_requests(count: int) -> None:
    rng, engine = random.Random(count), _engine()
    open_requests: dict[int, tuple[list[int], dict[str, object]]] = {}
    # Tokens and masks by request and sample, in few bytes, so that the growth of the process is the engine's.
    answers: dict[int, dict[int, tuple[array[int], array[int]]]] = {}
    ended: dict[int, set[int]] = {}
    finished, added, memory, tensors = [], 0, 0, 0
    while added < count or open_requests:
        # Without the limit, requests arrive faster than they are served, and the queue grows.
        while added < count and engine.scheduler.num_waiting < 40 and rng.random() < 0.6:
            prompt, options = _random_request(rng)
            if rng.random() < 0.1:
                with pytest.raises(UserError):
                    engine.add_request(prompt, SamplingParams(**{**options, **rng.choice(ABSURD)}))  # type: ignore[arg-type]
            request = engine.add_request(prompt, SamplingParams(**options))  # type: ignore[arg-type]
            assert request not in open_requests
            open_requests[request], answers[request], ended[request] = (prompt, options), {}, set()
            added += 1
        for event in engine.step():
            assert event.request in open_requests and event.sample not in ended[event.request]
            tokens, mask = answers[event.request].setdefault(event.sample, (array("H"), array("B")))
            tokens.append(event.token)
            mask.append(not event.forced)
            if event.finish_reason:
                ended[event.request].add(event.sample)
            if len(ended[event.request]) == open_requests[event.request][1]["num_samples"]:
                del ended[event.request]
                finished.append((event.request, *open_requests.pop(event.request)))
        if open_requests and rng.random() < 0.05:
            request = rng.choice(list(open_requests))
            engine.cancel(request)
            del open_requests[request], ended[request], answers[request]
        if not memory and added >= count // 2:
            memory, tensors = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, _tensor_bytes()
    assert len(engine.scheduler.running) == engine.scheduler.num_waiting == 0 and engine.step() == []
    assert not (engine.scheduler.shared or engine.requests)
    assert len(engine.prefixes) <= engine.runner.pool.num_slots
    if count >= 10_000:
        assert _tensor_bytes() < tensors + 1_000_000
        # Not constant: oneDNN caches code for up to 1,024 product shapes, and each prompt length is one.
        assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < memory + 150_000, "kilobytes"
    alone = _engine()
    for request, prompt, options in rng.sample(finished, 30):
        alone.prefixes.clear()
        [completions] = alone.generate([prompt], SamplingParams(**options))  # type: ignore[arg-type]
        for sample, completion in enumerate(completions):
            tokens, mask = answers[request][sample]
            assert (tokens.tolist(), mask.tolist()) == (completion.ids, completion.mask)


def test_a_request_that_never_fits_is_refused_with_numbers() -> None:
    engine = _engine()
    engine.budget._max_bytes = 20_000
    with pytest.raises(UserError, match=r"a sequence of 300 tokens needs .* GB for keys and values, and 2e-05 GB"):
        engine.add_request([1] * 290, SamplingParams(max_new_tokens=10))


def test_a_request_that_does_not_fit_now_waits() -> None:
    engine = _engine()
    slot = engine.runner.layout.slot_bytes(64)
    engine.budget._max_bytes = int(2 * 1.5 * slot)
    for number in range(5):
        engine.add_request([number, 1], SamplingParams(max_new_tokens=40, stop_tokens=()))
    engine.step()
    assert (len(engine.scheduler.running), engine.scheduler.num_waiting) == (2, 3)
    while engine.step():
        pool = engine.runner.pool
        assert pool.num_slots * pool.layout.slot_bytes(pool.capacity) <= engine.budget.max_bytes
        assert len(engine.scheduler.running) <= 2
    assert engine.scheduler.num_waiting == 0


def test_a_cancelled_request_frees_its_place_at_once() -> None:
    engine = _engine()
    first = engine.add_request([1] * 100, SamplingParams(num_samples=16, max_new_tokens=100, stop_tokens=()))
    second = engine.add_request([2, 3], SamplingParams(max_new_tokens=2, stop_tokens=()))
    engine.step()
    assert (len(engine.scheduler.running), engine.scheduler.num_waiting) == (16, 1)
    engine.cancel(first)
    assert {event.request for event in engine.step()} == {second}
    engine.cancel(first)
    engine.cancel(10**6)


def test_kv_slots_keep_all_keys_within_the_windows() -> None:
    """Slots of a short window are smaller, and do not grow with the context."""
    layout = _engine().runner.layout
    assert [layout.columns(layer, 320) for layer in range(2)] == [64, 64]
    wide = GPTConfig(sequence_len=256, vocab_size=265, n_layer=2, n_head=2, n_kv_head=1, n_embd=32, window_pattern="SL")
    layout = type(layout)(wide, torch.float32)
    assert [layout.columns(layer, 100) for layer in range(2)] == [128, 128]
    assert [layout.columns(layer, 2560) for layer in range(2)] == [192, 320]


def test_a_conversation_reuses_the_cache_of_earlier_turns() -> None:
    engine, turns = _engine(), [1] * 60
    read: list[int] = []
    prefill = engine.runner.prefill
    engine.runner.prefill = lambda chunks, ids: (read.append(len(ids)), prefill(chunks, ids))[1]  # type: ignore[method-assign, func-returns-value]
    for turn in range(3):
        [[completion]] = engine.generate([turns], SamplingParams(max_new_tokens=20, seed=turn, stop_tokens=()))
        turns = [*turns, *completion.ids, 7, 8, 9]
    assert read[0] == 59
    assert sum(read[1:]) == 2 * 3, "the last token of an answer, and all but the last of what follows"
    engine.refresh()
    engine.generate([turns], SamplingParams(max_new_tokens=1))
    assert sum(read) == 59 + 6 + len(turns) - 1


@pytest.mark.parametrize("prompts", [15, pytest.param(60, marks=pytest.mark.slow)])
def test_reused_prefixes_do_not_change_answers(prompts: int) -> None:
    """Prompts that diverge from each other at random positions, so that slots are truncated and wrap around again."""
    rng, warm, cold = random.Random(0), _engine(), _engine()
    base = [rng.randrange(256) for _ in range(250)]
    reused = 0
    for seed in range(prompts):
        length = rng.randint(20, 250)
        prompt = [*base[:length], *(rng.randrange(256) for _ in range(rng.randint(0, 8)))][:255]
        params = SamplingParams(max_new_tokens=rng.choice([1, 20, 60]), seed=seed, logprobs=True, stop_tokens=())
        reused += len(warm.prefixes) > 0
        [[found]] = warm.generate([prompt], params)
        cold.prefixes.clear()
        [[expected]] = cold.generate([prompt], params)
        assert found.ids == expected.ids, seed
        assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-4), seed
    assert reused > prompts * 40 // 60
