"""Formats answers as responses of OpenAI's API."""

import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any

from lmchat.serve.answers import Delta, Token
from lmchat.serve.run import Run
from lmchat.tokenizer.bpe import Tokenizer

JSON = dict[str, Any]


class Responses(ABC):
    """Formats the answers of one request; ``model`` is the name of the model that answers."""

    prefix: str
    whole_object: str
    chunk_object: str

    def __init__(self, tokenizer: Tokenizer, model: str) -> None:
        self.tokenizer = tokenizer
        self.id = f"{self.prefix}-{uuid.uuid4().hex}"
        self.model = model
        self.created = int(time.time())

    def whole(self, run: Run) -> JSON:
        """The response without streaming."""
        choices = [self._choice(run, number) for number in range(len(run.answers))]
        return self._envelope(self.whole_object, choices) | {"usage": usage(run)}

    def opening(self, run: Run) -> Iterator[JSON]:
        """Chunks before the first token."""
        return iter(())

    def chunk(self, run: Run, number: int, delta: Delta) -> JSON | None:
        """A chunk of a stream; None if there is nothing to send."""
        tokens = run.plan.top_logprobs is not None and delta.tokens
        if not (delta.parts or delta.finish_reason or tokens):
            return None
        return self._envelope(self.chunk_object, [self._part(run, number, delta)])

    def usage_chunk(self, run: Run) -> JSON:
        """The last chunk of a stream whose client asks for its usage."""
        return self._envelope(self.chunk_object, []) | {"usage": usage(run)}

    @abstractmethod
    def _choice(self, run: Run, number: int) -> JSON:
        """A complete answer."""

    @abstractmethod
    def _part(self, run: Run, number: int, delta: Delta) -> JSON:
        """A choice with the next part of an answer."""

    @abstractmethod
    def _logprobs(self, tokens: Sequence[Token]) -> JSON: ...

    def _wanted_logprobs(self, run: Run, tokens: Sequence[Token]) -> JSON | None:
        return None if run.plan.top_logprobs is None else self._logprobs(tokens)

    def _envelope(self, kind: str, choices: list[JSON]) -> JSON:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}


class ChatResponses(Responses):
    """Responses of ``/v1/chat/completions``. In addition to ``content``, ``parts`` has calculator calls and results."""

    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self, run: Run) -> Iterator[JSON]:
        for number in range(len(run.answers)):
            choice = {"index": number, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
            yield self._envelope(self.chunk_object, [choice])

    def _part(self, run: Run, number: int, delta: Delta) -> JSON:
        content: JSON = {"content": delta.text} if delta.text else {}
        if any(part["type"] != "text" for part in delta.parts):
            content["parts"] = delta.parts
        choice = {"index": number, "delta": content, "finish_reason": delta.finish_reason}
        if (logprobs := self._wanted_logprobs(run, delta.tokens)) is not None:
            choice["logprobs"] = logprobs
        return choice

    def _choice(self, run: Run, number: int) -> JSON:
        answer = run.answers[number].whole
        message = {"role": "assistant", "content": answer.text, "refusal": None, "parts": answer.parts}
        logprobs = self._wanted_logprobs(run, answer.tokens)
        return {"index": number, "message": message, "logprobs": logprobs, "finish_reason": answer.finish_reason}

    def _logprobs(self, tokens: Sequence[Token]) -> JSON:
        content = [
            self._token(token.id, token.logprob or 0.0) | {"top_logprobs": [self._token(*other) for other in token.top]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> JSON:
        data = self.tokenizer.decode_bytes([token])
        return {"token": data.decode("utf-8", errors="replace"), "logprob": logprob, "bytes": list(data)}


class CompletionResponses(Responses):
    """Responses of ``/v1/completions``. Log-probabilities include the stop token, unlike the text; lm-eval needs it."""

    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def opening(self, run: Run) -> Iterator[JSON]:
        if run.plan.echo is not None:
            for number in range(len(run.answers)):
                yield self._envelope(self.chunk_object, [self._part(run, number, run.echo_of(number))])

    def _choice(self, run: Run, number: int) -> JSON:
        whole = Delta()
        whole.add(run.echo_of(number))
        whole.add(run.answers[number].whole)
        return self._part(run, number, whole)

    def _part(self, run: Run, number: int, delta: Delta) -> JSON:
        logprobs = self._wanted_logprobs(run, delta.tokens)
        return {"index": number, "text": delta.text, "logprobs": logprobs, "finish_reason": delta.finish_reason}

    def _logprobs(self, tokens: Sequence[Token]) -> JSON:
        return {
            "tokens": [self._text(token.id) for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [self._likely(token) for token in tokens],
            "text_offset": [token.offset for token in tokens],
        }

    def _likely(self, token: Token) -> dict[str, float] | None:
        """The most likely tokens and the token itself; None where there is no log-probability."""
        if token.logprob is None:
            return None
        return {self._text(other): logprob for other, logprob in [(token.id, token.logprob), *token.top]}

    def _text(self, token: int) -> str:
        """Text of a token; incomplete characters are written as in OpenAI's API."""
        data = self.tokenizer.decode_bytes([token])
        try:
            return data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def usage(run: Run) -> JSON:
    """Token counts; a prompt's tokens count once for all its samples."""
    prompt, generated = run.num_prompt_tokens, run.num_generated_tokens
    return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}
