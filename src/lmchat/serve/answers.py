"""Converts the engine's tokens to text: incomplete characters, stop strings, log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lmchat.generation.engine import FinishReason, TokenEvent
from lmchat.generation.sequence import TextDecoder, TokenStream
from lmchat.tokenizer.bpe import Tokenizer
from lmchat.types import Part


@dataclass(frozen=True)
class Token:
    """A token of a prompt or an answer.

    Attributes:
        id: token id.
        logprob: log-probability; None if not requested, for calculator output and for the first token of a prompt.
        top: the most likely tokens at its place, as (token id, log-probability); empty if ``logprob`` is None.
        offset: number of characters before the one that it starts or continues.
    """

    id: int
    logprob: float | None
    top: Sequence[tuple[int, float]] = ()
    offset: int = 0


@dataclass
class Delta:
    """The addition of some tokens to an answer.

    Attributes:
        parts: text, calculator calls and results, none of them empty.
        tokens: the tokens.
        finish_reason: why the answer ends here; None if it continues.
    """

    parts: list[Part] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    @property
    def text(self) -> str:
        """The text without calculator calls and results."""
        return "".join(part["text"] for part in self.parts if part["type"] == "text")

    def add(self, other: Delta) -> None:
        for part in other.parts:
            append_part(self.parts, part)
        self.tokens += other.tokens
        self.finish_reason = other.finish_reason


def append_part(parts: list[Part], part: Part) -> None:
    """Appends a part; joins it to the last one if that has the same type."""
    if parts and parts[-1]["type"] == part["type"]:
        parts[-1] = {"type": part["type"], "text": parts[-1]["text"] + part["text"]}
    else:
        parts.append(part)


def text_offsets(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    """`Token.offset` of each token of a prompt."""
    decoder = TextDecoder()
    return [decoder.next(tokenizer.decode_bytes([token]))[1] for token in ids]


class StopStrings:
    """Finds the first of several stop strings, none of them empty, in a streamed text; then ``found`` is true."""

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = stops
        self.found = False
        self._held = ""

    def push(self, text: str, last: bool = False) -> str:
        """Processes the next piece of text; ``last`` ends the text.

        Returns:
            Text that is certainly not part of a stop string. A suffix that may start one is held back.
        """
        text = self._held + text
        starts = [start for stop in self.stops if (start := text.find(stop)) >= 0]
        self.found = bool(starts)
        end = min(starts) if starts else len(text) if last else len(text) - self._pending(text)
        self._held = "" if self.found else text[end:]
        return text[:end]

    def _pending(self, text: str) -> int:
        """Length of the longest suffix of ``text`` that is a prefix of a stop string."""
        longest = max(map(len, self.stops), default=1) - 1
        ends = range(min(longest, len(text)), 0, -1)
        return next((n for n in ends if any(stop.startswith(text[-n:]) for stop in self.stops)), 0)


class Answer:
    """One completion while it is generated.

    Args:
        stops: stop strings; searched in text, not in calculator calls and results.
        chat: separate calculator calls and results from text, and leave out the stop token.
        start: number of characters of the echoed prompt.

    Attributes:
        whole: the answer so far.
        num_tokens: number of generated tokens, including stop token and calculator results.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], *, chat: bool, start: int = 0) -> None:
        self.whole = Delta()
        self.num_tokens = 0
        self._start = start
        self._stream = TokenStream(tokenizer)
        self._stops = StopStrings(stops)
        self._chat = chat

    @property
    def done(self) -> bool:
        return self.whole.finish_reason is not None

    def take(self, event: TokenEvent) -> Delta:
        """Adds a token of the engine and returns the new text. After a stop string no more tokens must be added."""
        self.num_tokens += 1
        last = event.finish_reason is not None
        piece = self._stream.next(event.token, event.forced, last)
        delta = Delta(finish_reason=event.finish_reason)
        role = piece.role if self._chat else "text"
        if role == "text":
            text = self._stops.push(piece.text, last)
            if self._stops.found:
                delta.finish_reason = "stop"
        else:
            # A call interrupts the text, so held-back text can no longer become a stop string.
            if before := self._stops.push("", last=True):
                append_part(delta.parts, {"type": "text", "text": before})
            text = piece.text
        if text:
            append_part(delta.parts, {"type": role, "text": text})
        if event.finish_reason != "stop" or not self._chat:
            delta.tokens.append(Token(event.token, event.logprob, event.top, self._start + self._stream.offset))
        self.whole.add(delta)
        return delta
