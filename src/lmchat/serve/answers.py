"""Turns the engine's tokens into the text of answers: characters of several tokens, stop strings, log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lmchat.generation.engine import FinishReason, TokenEvent
from lmchat.generation.sequence import TokenStream
from lmchat.tokenizer.bpe import Tokenizer
from lmchat.types import Part


@dataclass(frozen=True)
class Token:
    """A token of an answer.

    Attributes:
        id: token id.
        logprob: log-probability; None where it is not asked for or where the calculator gave the token.
    """

    id: int
    logprob: float | None


@dataclass
class Delta:
    """What a stretch of tokens adds to an answer.

    Attributes:
        parts: text, calculator calls and their results, none of them empty.
        tokens: the tokens.
        finish_reason: why the answer ends here, None if it goes on.
    """

    parts: list[Part] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    @property
    def text(self) -> str:
        """The text without calculator calls and their results."""
        return "".join(part["text"] for part in self.parts if part["type"] == "text")

    def add(self, other: Delta) -> None:
        """Appends what follows."""
        for part in other.parts:
            append_part(self.parts, part)
        self.tokens += other.tokens
        self.finish_reason = other.finish_reason


def append_part(parts: list[Part], part: Part) -> None:
    """Appends a part, or its text if the last one is of the same type."""
    if parts and parts[-1]["type"] == part["type"]:
        parts[-1] = {"type": part["type"], "text": parts[-1]["text"] + part["text"]}
    else:
        parts.append(part)


class StopStrings:
    """Finds the first stop string in a text that arrives in pieces.

    Args:
        stops: the strings, none of them empty.

    Attributes:
        found: whether the text has ended at a stop string.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self.stops = stops
        self.found = False
        self._held = ""

    def push(self, text: str, last: bool = False) -> str:
        """Takes the next piece; ``last`` ends the text.

        Returns:
            What is certain to stand before any stop string. The longest end that may begin one is held back.
        """
        text = self._held + text
        starts = [start for stop in self.stops if (start := text.find(stop)) >= 0]
        self.found = bool(starts)
        end = min(starts) if starts else len(text) if last else len(text) - self._pending(text)
        self._held = "" if self.found else text[end:]
        return text[:end]

    def _pending(self, text: str) -> int:
        """Length of the longest end of ``text`` that begins a stop string."""
        longest = max(map(len, self.stops), default=1) - 1
        ends = range(min(longest, len(text)), 0, -1)
        return next((n for n in ends if any(stop.startswith(text[-n:]) for stop in self.stops)), 0)


class Answer:
    """One completion while it is generated.

    Args:
        tokenizer: of the model.
        stops: stop strings; they are looked for in text, not in calculator calls and results.
        chat: calculator calls and results are told from text, and the stop token is none of the tokens.

    Attributes:
        whole: everything so far.
        num_tokens: tokens generated, stop token and calculator results included.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str], *, chat: bool) -> None:
        self.whole = Delta()
        self.num_tokens = 0
        self._stream = TokenStream(tokenizer)
        self._stops = StopStrings(stops)
        self._chat = chat

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        return self.whole.finish_reason is not None

    def take(self, event: TokenEvent) -> Delta:
        """What a token of the engine adds. A stop string ends the answer; later tokens must not come."""
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
            # A call interrupts the text: what was held back cannot become a stop string any more.
            if before := self._stops.push("", last=True):
                append_part(delta.parts, {"type": "text", "text": before})
            text = piece.text
        if text:
            append_part(delta.parts, {"type": role, "text": text})
        if event.finish_reason != "stop" or not self._chat:
            delta.tokens.append(Token(event.token, event.logprob))
        self.whole.add(delta)
        return delta
