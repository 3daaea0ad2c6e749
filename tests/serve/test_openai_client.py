"""The server through OpenAI's client: answers equal the engine's, whole and streamed."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from live_server import TOKENIZER, LiveServer, tiny_engine
from lmchat.generation.sampling import SamplingParams
from lmchat.model.gpt import GPT
from lmchat.serve.load import model_card
from lmchat.tokenizer.render import render_for_completion

MESSAGES: list[Any] = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]


def client_of(live: LiveServer) -> Any:
    import openai  # takes a second, which each worker would spend if it were above

    return openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)


def expected_chat(calculator: bool = True, **options: Any) -> list[str]:
    """The engine's own answer, without calculator calls and results."""
    engine = tiny_engine()
    prompt = render_for_completion(TOKENIZER, {"messages": MESSAGES})
    [completions] = engine.generate([prompt], SamplingParams(calculator=calculator, **options))
    return [TOKENIZER.decode([i for i in each.content if i < 256]) for each in completions]


def test_chat_equals_the_engine(live: LiveServer) -> None:
    client = client_of(live)
    options: Any = {"max_tokens": 40, "temperature": 0.8, "top_p": 0.9, "seed": 5, "n": 3}
    answer = client.chat.completions.create(
        model="tiny-sft-7", messages=MESSAGES, extra_body={"top_k": 50, "calculator": False}, **options
    )
    expected = expected_chat(
        calculator=False, num_samples=3, max_new_tokens=40, temperature=0.8, top_p=0.9, seed=5, top_k=50
    )
    joined = ["".join(part["text"] for part in each.message.parts) for each in answer.choices]  # type: ignore[attr-defined]
    assert joined == expected
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(render_for_completion(TOKENIZER, {"messages": MESSAGES}))
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_stream_concatenates_to_the_full_answer(live: LiveServer) -> None:
    client = client_of(live)
    options: Any = {"model": "lmchat", "messages": MESSAGES, "max_tokens": 50, "seed": 9, "n": 2}
    whole = client.chat.completions.create(**options)
    texts, reasons, usages = ["", ""], [None, None], []
    for chunk in client.chat.completions.create(stream=True, stream_options={"include_usage": True}, **options):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
        usages.append(chunk.usage)
    assert texts == [choice.message.content for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices]
    assert usages[-1] == whole.usage and not any(usages[:-1])


def test_the_async_client_works(live: LiveServer) -> None:
    import openai

    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none") as client:
            asked = [
                client.chat.completions.create(model="lmchat", messages=MESSAGES, max_tokens=20, seed=seed)
                for seed in (1, 2, 1)
            ]
            return [str(answer.choices[0].message.content) for answer in await asyncio.gather(*asked)]

    first, second, third = asyncio.run(ask())
    assert first == third != second


def test_async_streams_have_the_logprobs_of_the_full_answers(live: LiveServer) -> None:
    import openai

    chat: Any = {"model": "lmchat", "messages": MESSAGES, "seed": 9, "max_tokens": 30, "logprobs": True}
    text: Any = {"model": "lmchat", "prompt": "a – b", "seed": 9, "max_tokens": 30, "logprobs": 2, "echo": True}

    async def ask() -> tuple[Any, Any]:
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="none") as client:
            chats, texts = client.chat.completions, client.completions
            chat_choices = [chunk.choices[0] async for chunk in await chats.create(stream=True, top_logprobs=2, **chat)]
            text_choices = [chunk.choices[0] async for chunk in await texts.create(stream=True, **text)]
            (whole_chat,) = (await chats.create(top_logprobs=2, **chat)).choices
            (whole_text,) = (await texts.create(**text)).choices
            return (chat_choices, whole_chat), (text_choices, whole_text)

    (chat_choices, whole_chat), (text_choices, whole_text) = asyncio.run(ask())
    assert "".join(each.delta.content or "" for each in chat_choices) == whole_chat.message.content
    tokens = [token for each in chat_choices if each.logprobs for token in each.logprobs.content]
    assert tokens == whole_chat.logprobs.content and len(tokens) > 1
    assert "".join(each.text for each in text_choices) == whole_text.text
    for name, values in whole_text.logprobs.model_dump().items():
        assert [value for each in text_choices for value in getattr(each.logprobs, name)] == values


def test_models(live: LiveServer) -> None:
    import openai

    client = client_of(live)
    assert [model.id for model in client.models.list()] == ["tiny-sft-7"]
    assert client.models.retrieve("tiny-sft-7").owned_by == "lmchat"
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny-sft-7'"):
        client.models.retrieve("gpt-4")


def test_the_card_counts_all_parameters() -> None:
    """The engine's own network has some of its weights packed."""
    engine = tiny_engine()
    checkpoint = SimpleNamespace(meta={"tag": "tiny"}, stage="sft", step=7, paths=SimpleNamespace(meta=Path(__file__)))
    card = model_card(checkpoint, engine)  # type: ignore[arg-type]
    assert card.name == "tiny-sft-7"
    assert card.details["parameters"] == sum(weight.numel() for weight in GPT(engine.config).parameters())
