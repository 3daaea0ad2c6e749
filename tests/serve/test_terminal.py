from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from typing import Any, cast

import pytest

from lmchat.generation.engine import Engine
from lmchat.generation.sampling import SamplingParams
from lmchat.generation.sequence import StreamedToken
from lmchat.serve.terminal import TerminalChat
from lmchat.tokenizer.bpe import Tokenizer
from lmchat.tokenizer.render import render_for_completion
from lmchat.types import Message, UserError

TOKENIZER = Tokenizer({bytes([byte]): byte for byte in range(256)})
MAX_NEW_TOKENS = 10


class Terminal:
    """A chat whose answers are ``ok``; records the prompts and seeds of its answers. It is its own engine."""

    tokenizer = TOKENIZER

    def __init__(self, context_limit: int = 1000, seed: int = 42, system: str | None = None) -> None:
        self.prompts: list[str] = []
        self.seeds: list[int] = []
        self.tokens = [StreamedToken(1, "o", "text"), StreamedToken(2, "k", "text")]
        self.context_limit = context_limit
        self.chat = TerminalChat(cast(Engine, self), SamplingParams(max_new_tokens=MAX_NEW_TOKENS, seed=seed), system)

    def stream(self, prompt: list[int], params: SamplingParams) -> Iterator[StreamedToken]:
        assert len(prompt) + MAX_NEW_TOKENS <= self.context_limit
        self.prompts.append(TOKENIZER.decode(prompt))
        self.seeds.append(params.seed)
        return iter(self.tokens)

    def run(self, monkeypatch: pytest.MonkeyPatch, *lines: str, terminal: bool = False) -> None:
        stdin = io.StringIO("".join(line + "\n" for line in lines))
        stdin.isatty = lambda: terminal  # type: ignore[method-assign]
        monkeypatch.setattr(sys, "stdin", stdin)
        self.chat.run()


def test_answer_shows_calculator_calls_in_brackets(capsys: pytest.CaptureFixture[str]) -> None:
    pieces = [
        StreamedToken(1, "It is ", "text"),
        StreamedToken(2, "", "python"),
        StreamedToken(3, "1+", "python"),
        StreamedToken(4, "2", "python"),
        StreamedToken(5, "3", "python_output"),
        StreamedToken(6, ".", "text"),
    ]
    terminal = Terminal()
    terminal.tokens = pieces
    assert terminal.chat.ask("1+2?") == "It is 1+23."
    messages = terminal.chat.messages
    assert capsys.readouterr().out == "It is [1+2 = 3].\n"
    assert messages[0] == {"role": "user", "content": "1+2?"}
    assert [part["type"] for part in cast(list[Any], messages[1]["content"])] == [
        "text",
        "python",
        "python_output",
        "text",
    ]


def test_control_characters_of_an_answer_do_not_reach_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "\x1b]52;c;aGk=\x07\x1b[2J\x9b31m é\tb\r\nc\x7f\x00"
    terminal = Terminal()
    terminal.tokens = [StreamedToken(1, hostile[:9], "text"), StreamedToken(2, hostile[9:], "text")]
    assert terminal.chat.ask("Hi") == hostile
    assert capsys.readouterr().out == "�]52;c;aGk=��[2J�31m é\tb\nc��\n"


def test_an_empty_answer_does_not_change_the_conversation() -> None:
    terminal = Terminal()
    terminal.tokens = []
    assert terminal.chat.ask("Hi") == ""
    assert terminal.chat.messages == []


def test_a_conversation_is_kept_until_it_is_reset(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = Terminal(seed=7)
    terminal.run(monkeypatch, "One", "", "Two", "/reset", "Three", "/nonsense", "/quit", "Four")
    assert ["One" in prompt for prompt in terminal.prompts] == [True, True, False]
    assert "Three" in terminal.prompts[2] and len(terminal.prompts) == 3
    assert terminal.seeds == [7, 8, 9]
    assert "unknown command /nonsense" in capsys.readouterr().err


def test_the_system_prompt_can_be_set_and_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal(system="Be brief.")
    terminal.run(monkeypatch, "Hi", "/system Be kind.", "Hi", "/reset", "Hi", "/system", "Hi")
    first, second, third, fourth = terminal.prompts
    assert "Be brief." in first and "Be kind." in second and second == third and "Be" not in fourth


def shortest_prompt(system: str) -> int:
    messages: list[Message] = [{"role": "system", "content": system}, {"role": "user", "content": "?"}]
    return len(render_for_completion(TOKENIZER, {"messages": messages[not system :]}))


@pytest.mark.parametrize("system", ["", "Be brief."])
def test_a_context_without_room_for_a_question_is_refused_at_the_start(system: str) -> None:
    prompt = shortest_prompt(system)
    Terminal(context_limit=prompt + MAX_NEW_TOKENS, system=system).chat.ask("?")
    with pytest.raises(UserError) as refusal:
        Terminal(context_limit=prompt + MAX_NEW_TOKENS - 1, system=system)
    message = str(refusal.value)
    assert f"has {prompt} tokens and --max_new_tokens is {MAX_NEW_TOKENS}" in message
    assert f"context of {prompt + MAX_NEW_TOKENS - 1}; lower --max_new_tokens to at most 9" in message
    assert ("shorten the system prompt" in message) == bool(system)
    assert "/reset" not in message


def test_a_system_prompt_without_room_for_a_question_does_not_change_the_conversation(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = Terminal(context_limit=100)
    terminal.run(monkeypatch, "One", "/system " + "long" * 30, "Two")
    assert "One" in terminal.prompts[1] and "long" not in terminal.prompts[1]
    errors = capsys.readouterr().err
    assert errors.count("shorten the system prompt; the conversation goes on as before") == 1
    assert "--max_new_tokens to" not in errors  # the system prompt alone exceeds the context


def conversation(turns: int, system: bool) -> list[Message]:
    messages: list[Message] = [{"role": "system", "content": "Be brief."}] if system else []
    for turn in range(turns):
        messages += [{"role": "user", "content": f"{turn}" * 20}, {"role": "assistant", "content": "ok"}]
    return messages


@pytest.mark.parametrize("system", [False, True])
@pytest.mark.parametrize("forgotten", [0, 1, 3])
def test_only_as_many_turns_as_needed_are_dropped(system: bool, forgotten: int) -> None:
    messages = conversation(4, system)
    kept = [*messages[:system], *messages[system + 2 * forgotten :], {"role": "user", "content": "Hi"}]
    limit = len(render_for_completion(TOKENIZER, {"messages": kept}))  # type: ignore[typeddict-item]
    chat = Terminal(context_limit=limit + MAX_NEW_TOKENS, system="Be brief." if system else None).chat
    chat.messages = messages
    assert chat.turns_to_forget("Hi") == forgotten
    assert chat.turns_to_forget("Hi" * 1000) == 0


def test_the_oldest_turns_are_dropped_with_a_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = Terminal(context_limit=100)
    terminal.run(monkeypatch, "a" * 50, "b" * 50, "c" * 200, "d" * 5)
    assert ["aa" in prompt for prompt in terminal.prompts] == [True, False, False]
    assert "bb" in terminal.prompts[2]
    errors = capsys.readouterr().err
    assert "exceeds the model's context of 100 tokens; the oldest 1 turn forgotten" in errors
    assert (
        f"this message has {shortest_prompt('') + 199} tokens and --max_new_tokens is 10, together more than the "
        "model's context of 100; shorten the message; this message is ignored"
    ) in errors


@pytest.mark.parametrize("system", ["", "Be brief."])
@pytest.mark.parametrize(("excess", "room"), [(1, 9), (9, 1), (10, 0)])
def test_a_message_that_is_too_long_is_refused_with_the_remedies_that_help(
    system: str, excess: int, room: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Earlier turns, which can be forgotten, are not counted; the conversation goes on."""
    length = 100 - MAX_NEW_TOKENS - shortest_prompt(system) + 1 + excess
    terminal = Terminal(context_limit=100, system=system)
    terminal.run(monkeypatch, "One", "e" * length, "Two")
    assert len(terminal.prompts) == 2 and "One" in terminal.prompts[1]
    what = "this message" + " with this system prompt" * bool(system)
    remedy = f"lower --max_new_tokens to at most {room} or " * bool(room) + "shorten the message"
    expected = f"{what} has {100 - room} tokens and --max_new_tokens is 10, together more than the model's context of"
    assert f"{expected} 100; {remedy}; this message is ignored\n" in capsys.readouterr().err


@pytest.mark.parametrize("reply, answers", [("", 2), ("y", 2), ("n", 1)])
def test_a_terminal_asks_before_dropping_turns(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, reply: str, answers: int
) -> None:
    monkeypatch.setenv("LMCHAT_BASE_DIR", str(tmp_path))
    terminal = Terminal(context_limit=100)
    terminal.run(monkeypatch, "a" * 50, "b" * 50, reply, terminal=True)
    assert len(terminal.prompts) == answers
    assert len(terminal.chat.messages) == 2  # of the second question, or of the first
    assert ("a" * 50 in str(terminal.chat.messages)) == (answers == 1)


def test_ctrl_c_at_the_question_whether_to_drop_turns_keeps_the_conversation(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    monkeypatch.setenv("LMCHAT_BASE_DIR", str(tmp_path))
    replies = iter(["a" * 50, "b" * 50, KeyboardInterrupt, "/quit"])

    def reply(_: str) -> str:
        if (line := next(replies)) is KeyboardInterrupt:
            raise KeyboardInterrupt
        return str(line)

    monkeypatch.setattr("builtins.input", reply)
    terminal = Terminal(context_limit=100)
    terminal.run(monkeypatch, terminal=True)
    assert next(replies, None) is None and len(terminal.prompts) == 1
    assert [message["role"] for message in terminal.chat.messages] == ["user", "assistant"]


def test_ctrl_c_stops_an_answer_in_a_terminal(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(prompt: list[int], params: SamplingParams) -> Iterator[StreamedToken]:
        yield StreamedToken(1, "o", "text")
        raise KeyboardInterrupt

    monkeypatch.setenv("LMCHAT_BASE_DIR", str(tmp_path))
    terminal = Terminal()
    terminal.stream = interrupted  # type: ignore[method-assign]
    terminal.run(monkeypatch, "Hi", terminal=True)
    assert terminal.chat.messages == [] and "stopped" in capsys.readouterr().err
    with pytest.raises(KeyboardInterrupt):
        terminal.run(monkeypatch, "Hi")


def test_input_history_is_kept_between_chats(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> None:
    pytest.importorskip("readline")
    monkeypatch.setenv("LMCHAT_BASE_DIR", str(tmp_path))
    Terminal().run(monkeypatch, "Hi", terminal=True)
    assert (tmp_path / "chat_history").is_file()
