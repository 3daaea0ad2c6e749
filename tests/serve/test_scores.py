"""Log-probabilities of the API compared with the network's logits."""

from __future__ import annotations

import math
from typing import Any

import httpx
import pytest
import torch

from live_server import TOKENIZER, LiveServer, tiny_engine, wait_for
from lmchat.serve.run import Run
from lmchat.types import UserError

TEXT = "The cat – sat."


def log_softmax(ids: list[int]) -> torch.Tensor:
    """(tokens, vocabulary) by a plain forward pass."""
    net = tiny_engine().runner.weights.source.eval()
    with torch.inference_mode():
        return net.logits(net.hidden(torch.tensor([ids])))[0].double().log_softmax(-1)


def test_scores_equal_a_plain_forward_pass() -> None:
    engine = tiny_engine()
    ids = [TOKENIZER.bos_id, *(i % 256 for i in range(7, 1800, 3))][: engine.context_limit]
    (logprobs, top), plain = engine.score(ids, top=3), log_softmax(ids)
    assert len(logprobs) == len(top) == len(ids) - 1
    for place in range(len(ids) - 1):
        assert math.isclose(logprobs[place], plain[place, ids[place + 1]].item(), abs_tol=1e-4)
        values, chosen = plain[place].topk(3)
        assert [token for token, _ in top[place]] == chosen.tolist()
        assert [logprob for _, logprob in top[place]] == pytest.approx(values.tolist(), abs=1e-4)
    assert engine.score([5]) == ([], [])
    assert engine.score([5, 6])[1] == [[]]
    with pytest.raises(UserError, match="the text is empty"):
        engine.score([])


def client_of(live: LiveServer) -> Any:
    import openai  # takes a second, which each worker would spend if it were above

    return openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)


@pytest.mark.parametrize("as_tokens", [False, True])
@pytest.mark.parametrize("stream", [False, True])
def test_echo_scores_the_prompt(live: LiveServer, as_tokens: bool, stream: bool) -> None:
    ids = [TOKENIZER.bos_id, *TEXT.encode()]
    plain = log_softmax(ids)
    options: Any = {"prompt": [ids] if as_tokens else TEXT, "max_tokens": 0, "echo": True, "logprobs": 1}
    if stream:
        chunk, end = client_of(live).completions.create(model="lmchat", stream=True, **options)
        choice = chunk.choices[0]
        assert (end.choices[0].text, end.choices[0].finish_reason) == ("", "length")
    else:
        choice = client_of(live).completions.create(model="lmchat", **options).choices[0]
    found = choice.logprobs
    assert found is not None and found.token_logprobs and found.tokens and found.top_logprobs and found.text_offset
    given, tops = list(found.token_logprobs), list(found.top_logprobs)
    if as_tokens:
        assert choice.text == f"<|bos|>{TEXT}" and given.pop(0) is None and tops.pop(0) is None
    else:
        assert choice.text == TEXT
    expected = plain[range(len(ids) - 1), ids[1:]].tolist()
    assert given == pytest.approx(expected, abs=1e-4)
    for place, top in enumerate(tops):
        assert max(top.values()) == pytest.approx(plain[place].max().item(), abs=1e-4)
    assert "bytes:\\xe2" in found.tokens
    starts = [place for place, character in enumerate(choice.text) for _ in character.encode()]
    assert found.text_offset == ([0] + [start for start in starts if start > 6] if as_tokens else starts)


def test_logprobs_of_generated_tokens(live: LiveServer) -> None:
    options: Any = {"model": "lmchat", "prompt": TEXT, "max_tokens": 12, "seed": 1, "n": 2}
    client = client_of(live)
    plain_runs = client.completions.create(logprobs=0, **options).choices
    scored_runs = client.completions.create(logprobs=2, **options).choices
    echoed_runs = client.completions.create(logprobs=2, echo=True, **options).choices
    for run, scored, echoed in zip(plain_runs, scored_runs, echoed_runs, strict=True):
        assert run.logprobs and scored.logprobs and echoed.logprobs and run.logprobs.token_logprobs
        assert run.text == scored.text and echoed.text == TEXT + run.text
        assert scored.logprobs.token_logprobs == pytest.approx(run.logprobs.token_logprobs, abs=1e-4)
        size = len(run.logprobs.token_logprobs)
        assert size == 12 or run.finish_reason == "stop"
        assert echoed.logprobs.token_logprobs == pytest.approx(
            [*(echoed.logprobs.token_logprobs or [])[:-size], *run.logprobs.token_logprobs], abs=1e-4
        )


def id_of(token: str) -> int:
    """The id of a token as the API writes it."""
    if token.startswith("<|"):
        return TOKENIZER.special(token.strip("<|>"))
    return int(token[-2:], 16) if token.startswith("bytes:") else ord(token)


@pytest.mark.parametrize("echo", [False, True])
def test_streamed_logprobs_equal_a_plain_forward_pass(live: LiveServer, echo: bool) -> None:
    options: Any = {"model": "lmchat", "prompt": [TEXT, "B"], "max_tokens": 12, "seed": 1, "n": 2, "logprobs": 3}
    chunks = list(client_of(live).completions.create(stream=True, echo=echo, **options))
    whole = client_of(live).completions.create(echo=echo, **options).choices
    assert len(chunks) > len(whole) + echo * len(whole)
    for number, choice in enumerate(whole):
        parts = [each.choices[0] for each in chunks if each.choices[0].index == number]
        assert "".join(part.text for part in parts) == choice.text and parts[-1].finish_reason == choice.finish_reason
        gained: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for part in parts:
            for name, values in gained.items():
                values += getattr(part.logprobs, name)
        assert choice.logprobs and gained == {name: getattr(choice.logprobs, name) for name in gained}
        before = [TOKENIZER.bos_id, *([] if echo else options["prompt"][number // 2].encode())]
        for token, offset in zip(gained["tokens"], gained["text_offset"], strict=True):
            if len(token) == 1:
                assert choice.text[offset] == token
        tokens = list(map(id_of, gained["tokens"]))
        plain = log_softmax(before + tokens)[len(before) - 1 : -1]
        expected = plain[range(len(tokens)), tokens].tolist()
        assert gained["token_logprobs"] == pytest.approx(expected, abs=1e-4)
        for row, top in zip(plain, gained["top_logprobs"], strict=True):
            assert sorted(top.values())[-3:] == pytest.approx(row.topk(3).values.tolist()[::-1], abs=1e-4)


def test_chat_logprobs_whole_and_streamed(live: LiveServer) -> None:
    import openai

    client = client_of(live)
    options: Any = {"model": "lmchat", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 20, "seed": 2}
    plain = client.chat.completions.create(logprobs=True, **options).choices[0].logprobs
    scored = client.chat.completions.create(logprobs=True, top_logprobs=3, **options).choices[0].logprobs
    assert plain and scored and plain.content and scored.content
    assert [token.bytes for token in plain.content] == [token.bytes for token in scored.content]
    assert all(len(token.top_logprobs) == 3 for token in scored.content)
    for tops in (0, 3):
        wanted = {"top_logprobs": tops} if tops else {}
        tokens: list[Any] = []
        num_chunks = 0
        for chunk in client.chat.completions.create(logprobs=True, stream=True, **wanted, **options):
            if chunk.choices[0].logprobs:
                tokens += chunk.choices[0].logprobs.content or []
                num_chunks += 1
        assert num_chunks > 1
        expected = scored.content if tops else plain.content
        assert [token.bytes for token in tokens] == [token.bytes for token in expected]
        assert [token.logprob for token in tokens] == pytest.approx([token.logprob for token in expected], abs=1e-4)
    with pytest.raises(openai.BadRequestError, match="top_logprobs needs logprobs"):
        client.chat.completions.create(top_logprobs=3, **options)


def lm_eval_score(choice: Any, context: int) -> tuple[float, bool]:
    """The continuation's score as lm-eval's local-completions computes it, without the last, generated token."""
    logprobs = choice.logprobs.token_logprobs[context:-1]
    tops = choice.logprobs.top_logprobs[context:-1]
    return sum(logprobs), all(own == max(top.values()) for own, top in zip(logprobs, tops, strict=True))


def test_whole_responses_have_limited_logprobs_and_streams_keep_none(
    live: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    import openai

    client = client_of(live)
    options: Any = {"model": "lmchat", "prompt": ["a"] * 33, "n": 8, "max_tokens": 600, "logprobs": 20}
    with pytest.raises(openai.BadRequestError, match="3326400 log-probabilities exceed 1000000; ask for fewer, or for"):
        client.completions.create(**options)
    with pytest.raises(openai.BadRequestError, match="1008000 log-probabilities"):
        client.completions.create(**options | {"prompt": ["a" * 600] * 10, "max_tokens": 0, "echo": True})
    kept: list[int] = []
    close = Run.close

    def closed(run: Run) -> None:
        kept.append(len(run.answers[0].whole.tokens))
        close(run)

    monkeypatch.setattr(Run, "close", closed)
    options |= {"prompt": "a", "n": 1, "max_tokens": 20, "seed": 1}
    chunks = list(client.completions.create(stream=True, **options))
    assert sum(len(chunk.choices[0].logprobs.tokens) for chunk in chunks) > 1
    client.completions.create(**options)
    wait_for(lambda: len(kept) == 2)
    assert kept[0] == 0 < kept[1]


@pytest.mark.parametrize("with_bos", [False, True])
def test_continuations_are_scored_for_lm_eval(live: LiveServer, with_bos: bool) -> None:
    client, bos = client_of(live), TOKENIZER.bos_id
    prompts = [[*[bos] * with_bos, *f"{number} and then".encode()] for number in range(40)]
    reply = client.completions.create(
        model="lmchat", prompt=prompts, temperature=0, max_tokens=1, logprobs=1, seed=1234, echo=True
    )
    for prompt, choice in zip(prompts, reply.choices, strict=True):
        ids = prompt if with_bos else [bos, *prompt]
        plain = log_softmax(ids)
        places = range(len(ids) - 5, len(ids) - 1)
        expected = sum(plain[place, ids[place + 1]].item() for place in places)
        greedy = all(plain[place].argmax() == ids[place + 1] for place in places)
        assert lm_eval_score(choice, len(prompt) - 4) == (pytest.approx(expected, abs=1e-3), greedy)
        assert choice.logprobs and len(choice.logprobs.tokens or ()) == len(prompt) + 1


def test_tokenize_and_detokenize(live: LiveServer) -> None:
    def post(path: str, body: Any) -> Any:
        return httpx.post(f"{live.url}/{path}", json=body).json()

    assert post("tokenize", {"prompt": TEXT, "add_special_tokens": False})["tokens"] == [*TEXT.encode()]
    info = httpx.get(f"{live.url}/tokenizer_info").json()
    assert post("tokenize", {"prompt": info["bos_token"]})["tokens"] == [TOKENIZER.bos_id]
    assert post("detokenize", {"tokens": [*TEXT.encode()]}) == {"prompt": TEXT}
    for path, body in {"tokenize": {"prompt": 1}, "detokenize": {"tokens": [-1]}}.items():
        assert httpx.post(f"{live.url}/{path}", json=body).status_code == 400
