"""Stop strings and the text of answers, compared with searches in the whole text."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from live_server import TOKENIZER
from lmchat.generation.engine import TokenEvent
from lmchat.serve.answers import Answer, StopStrings, text_offsets

STOP = st.text("ab", min_size=1, max_size=4)


@given(st.lists(st.text("abc", max_size=4), max_size=12), st.lists(STOP, max_size=3))
def test_stop_strings_are_found_across_any_pieces(pieces: list[str], stops: list[str]) -> None:
    found, shown = StopStrings(stops), ""
    for number, piece in enumerate(pieces):
        shown += found.push(piece, last=number == len(pieces) - 1)
        text = "".join(pieces[: number + 1])
        ends = [text.find(stop) for stop in stops if stop in text]
        assert found.found == bool(ends)
        if ends:
            assert shown == text[: min(ends)]
            return
        # All text is shown except a possible start of a stop string.
        held = text[len(shown) :]
        assert text.startswith(shown)
        assert not held or any(stop.startswith(held) for stop in stops)
    assert shown == "".join(pieces)


def events(*tokens: int, forced: tuple[int, ...] = (), reason: str = "length") -> list[TokenEvent]:
    last = len(tokens) - 1
    return [
        TokenEvent(
            0, 0, token, place in forced, None if place in forced else -1.0, [], reason if place == last else None
        )  # type: ignore[arg-type]
        for place, token in enumerate(tokens)
    ]


def test_characters_of_several_tokens_and_calculator_calls() -> None:
    special = TOKENIZER.special
    call = [special("python_start"), *b"1+1", special("python_end")]
    result = [special("output_start"), *b"2", special("output_end")]
    tokens = [*"é is ".encode(), *call, *result, *"2€".encode(), special("assistant_end")]
    start = len("é is ".encode()) + len(call)
    answer = Answer(TOKENIZER, ["is x"], chat=True)
    texts = []
    for event in events(*tokens, forced=tuple(range(start, start + len(result))), reason="stop"):
        delta = answer.take(event)
        texts.append(delta.text)
    assert answer.whole.parts == [
        {"type": "text", "text": "é is "},
        {"type": "python", "text": "1+1"},
        {"type": "python_output", "text": "2"},
        {"type": "text", "text": "2€"},
    ]
    assert "".join(texts) == answer.whole.text == "é is 2€" and "\ufffd" not in "".join(texts)
    assert answer.whole.finish_reason == "stop" and answer.num_tokens == len(tokens)
    assert [token.id for token in answer.whole.tokens] == tokens[:-1]


@given(st.text("aé€😀", min_size=1), st.text("bß", max_size=3))
def test_tokens_know_the_character_they_belong_to(text: str, prompt: str) -> None:
    def characters(text: str, start: int) -> list[int]:
        return [place for place, character in enumerate(text, start) for _ in character.encode()]

    prompt_ids = [*prompt.encode(), TOKENIZER.bos_id]
    echo = TOKENIZER.decode(prompt_ids)
    assert text_offsets(TOKENIZER, prompt_ids) == [*characters(prompt, 0), len(prompt)]
    answer, special = Answer(TOKENIZER, [], chat=False, start=len(echo)), TOKENIZER.special("python_start")
    for event in events(*text.encode(), special, *text.encode()):
        answer.take(event)
    end = len(echo + text)
    assert [token.offset for token in answer.whole.tokens] == [
        *characters(text, len(echo)), end, *characters(text, end)
    ]  # fmt: skip


def test_an_incomplete_character_at_the_end_is_replaced() -> None:
    answer = Answer(TOKENIZER, [], chat=False)
    for event in events(*"a€".encode()[:-1]):
        answer.take(event)
    assert answer.whole.text == "a\ufffd"


def test_a_stop_string_across_tokens_ends_the_answer() -> None:
    rng = random.Random(0)
    text = "".join(rng.choice("ab\n") for _ in range(200)) + "\n\nQ:" + "rest"
    answer = Answer(TOKENIZER, ["\n\nQ:"], chat=False)
    for event in events(*text.encode()):
        if answer.take(event).finish_reason:
            break
    assert answer.whole.text == text[: text.index("\n\nQ:")] and answer.whole.finish_reason == "stop"
