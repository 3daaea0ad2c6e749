"""Formats answers as responses of OpenAI's API."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from lmchat.serve.answers import Delta, Token
from lmchat.serve.run import Run
from lmchat.tokenizer.bpe import Tokenizer

JSON = dict[str, Any]
Top = Sequence[tuple[int, float]]


class Responses:
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
        raise NotImplementedError

    def scored_chunk(self, run: Run, number: int) -> JSON:
        """A whole answer as one chunk."""
        return self._envelope(self.chunk_object, [self._choice(run, number)])

    def usage_chunk(self, run: Run) -> JSON:
        """The last chunk of a stream whose client asks for its usage."""
        return self._envelope(self.chunk_object, []) | {"usage": usage(run)}

    def _choice(self, run: Run, number: int) -> JSON:
        raise NotImplementedError

    def _envelope(self, kind: str, choices: list[JSON]) -> JSON:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model, "choices": choices}

    def _scored(self, run: Run, number: int, tokens: Sequence[Token]) -> list[tuple[Token, Top]]:
        """Tokens of an answer with log-probabilities, and the most likely tokens at their positions."""
        if not run.scores:
            return [(token, ()) for token in tokens]
        start, scores = len(run.prompt_of(number)) - 1, run.scores[number]
        rows = zip(tokens, scores.logprobs[start:], scores.top[start:], strict=True)
        return [(Token(token.id, logprob), top) for token, logprob, top in rows]


class ChatResponses(Responses):
    """Responses of ``/v1/chat/completions``. In addition to ``content``, ``parts`` has calculator calls and results."""

    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self, run: Run) -> Iterator[JSON]:
        for number in range(len(run.answers)):
            choice = {"index": number, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
            yield self._envelope(self.chunk_object, [choice])

    def chunk(self, run: Run, number: int, delta: Delta) -> JSON | None:
        if not delta.parts and not delta.finish_reason and not delta.tokens:
            return None
        content: JSON = {"content": delta.text} if delta.text else {}
        if any(part["type"] != "text" for part in delta.parts):
            content["parts"] = delta.parts
        choice = {"index": number, "delta": content, "finish_reason": delta.finish_reason}
        if run.plan.top_logprobs is not None:
            choice["logprobs"] = self._logprobs(self._scored(run, number, delta.tokens))
        elif not content and not delta.finish_reason:
            return None
        return self._envelope(self.chunk_object, [choice])

    def scored_chunk(self, run: Run, number: int) -> JSON:
        chunk = self.chunk(run, number, run.answers[number].whole)
        assert chunk is not None, "an answer has a finish reason"
        return chunk

    def _choice(self, run: Run, number: int) -> JSON:
        answer = run.answers[number].whole
        message = {"role": "assistant", "content": answer.text, "refusal": None, "parts": answer.parts}
        logprobs = None
        if run.plan.top_logprobs is not None:
            logprobs = self._logprobs(self._scored(run, number, answer.tokens))
        return {"index": number, "message": message, "logprobs": logprobs, "finish_reason": answer.finish_reason}

    def _logprobs(self, tokens: Sequence[tuple[Token, Top]]) -> JSON:
        content = [
            self._token(token.id, token.logprob or 0.0) | {"top_logprobs": [self._token(*other) for other in top]}
            for token, top in tokens
        ]
        return {"content": content, "refusal": None}

    def _token(self, token: int, logprob: float) -> JSON:
        data = self.tokenizer.decode_bytes([token])
        return {"token": data.decode("utf-8", errors="replace"), "logprob": logprob, "bytes": list(data)}


class CompletionResponses(Responses):
    """Responses of ``/v1/completions``. Log-probabilities include the stop token, unlike the text; lm-eval needs it.

    Args:
        added: number of tokens at the beginning of each prompt that the client did not send and does not get back.
    """

    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, tokenizer: Tokenizer, model: str, added: Sequence[int]) -> None:
        super().__init__(tokenizer, model)
        self.added = added

    def opening(self, run: Run) -> Iterator[JSON]:
        if run.plan.echo and not run.plan.needs_scores:
            for number in range(len(run.answers)):
                yield self._chunk(number, self._echo(run, number), None, None)

    def chunk(self, run: Run, number: int, delta: Delta) -> JSON | None:
        logprobs = None
        if run.plan.top_logprobs is not None:
            logprobs = self._logprobs(self._scored(run, number, delta.tokens))
        if not delta.text and not delta.finish_reason and not (logprobs and delta.tokens):
            return None
        return self._chunk(number, delta.text, logprobs, delta.finish_reason)

    def _chunk(self, number: int, text: str, logprobs: JSON | None, reason: str | None) -> JSON:
        choice = {"index": number, "text": text, "logprobs": logprobs, "finish_reason": reason}
        return self._envelope(self.chunk_object, [choice])

    def _choice(self, run: Run, number: int) -> JSON:
        answer, text, logprobs = run.answers[number].whole, "", None
        if run.plan.top_logprobs is not None:
            tokens = self._scored(run, number, answer.tokens)
            logprobs = self._logprobs([*self._prompt_tokens(run, number), *tokens] if run.plan.echo else tokens)
        if run.plan.echo:
            text = self._echo(run, number)
        reason = answer.finish_reason
        return {"index": number, "text": text + answer.text, "logprobs": logprobs, "finish_reason": reason}

    def _echo(self, run: Run, number: int) -> str:
        return self.tokenizer.decode(run.prompt_of(number)[self._added(run, number) :])

    def _added(self, run: Run, number: int) -> int:
        return self.added[number // run.plan.num_samples]

    def _prompt_tokens(self, run: Run, number: int) -> list[tuple[Token, Top]]:
        prompt, scores = run.prompt_of(number), run.scores[number]
        tokens: list[tuple[Token, Top]] = [(Token(prompt[0], None), ())]
        for token, logprob, top in zip(prompt[1:], scores.logprobs, scores.top, strict=False):
            tokens.append((Token(token, logprob), top))
        return tokens[self._added(run, number) :]

    def _logprobs(self, tokens: Sequence[tuple[Token, Top]]) -> JSON:
        texts = [self._text(token.id) for token, _ in tokens]
        offsets, offset = [], 0
        for token, _ in tokens:
            offsets.append(offset)
            offset += len(self.tokenizer.decode([token.id]))
        likely = [self._likely(token, top) for token, top in tokens]
        return {
            "tokens": texts,
            "token_logprobs": [token.logprob for token, _ in tokens],
            "top_logprobs": likely,
            "text_offset": offsets,
        }

    def _likely(self, token: Token, top: Top) -> dict[str, float] | None:
        """The most likely tokens and the token itself; None for the first token of a text."""
        if token.logprob is None:
            return None
        return {self._text(other): logprob for other, logprob in [(token.id, token.logprob), *top]}

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
